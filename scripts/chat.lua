--- wane chat: a conversation with a model.
local cli = require "wane.cli"
local ffi = require "ffi"

local parser = cli.parser("chat", "A conversation: each line from you is answered. /reset begins anew, /quit or ctrl-D ends; ctrl-C stops an answer.")
cli.model_options(parser)
parser:option("--system", "The system message.")
parser:option("--max-new-tokens", "Tokens of an answer at most (512)."):convert(cli.count)
parser:flag("--sample", "Draw tokens instead of taking the likeliest.")
parser:option("--temperature", "With --sample: divides the scores (1.0)."):convert(cli.number)
parser:option("--top-k", "With --sample: only the k likeliest (50; 0: all)."):convert(cli.count)
parser:option("--top-p", "With --sample: the smallest set of this probability (1.0)."):convert(cli.number)
parser:option("--repetition-penalty", "Divides the scores of ids seen before (1.0)."):convert(cli.number)
parser:option("--seed", "Of --sample."):convert(cli.count)

local terminal = package.preload["wane.terminal"] and require "wane.terminal"
local interactive = ffi.C.isatty(0) ~= 0

-- A line from the user; nil at the end of input. At a terminal the line editor of the REPL, with a history of this run.
local function reader()
  if not (interactive and terminal and package.preload["wane.repl.editor"]) then
    return function()
      if interactive then cli.out "you> " end
      return io.read "*l"
    end
  end
  local history = { entries = {} }
  local editor = require("wane.repl.editor").new(terminal, { prompt = "you> ", continuation = "   > ", history = history })
  return function()
    while true do
      local line, why = editor:read()
      if line then
        history.entries[#history.entries + 1] = line
        return line
      elseif why == "eof" then
        return nil
      end
    end
  end
end

-- Streams one answer and returns its text. ctrl-C ends the answer, not the program.
local function answer(model, tok, messages, options)
  local prompt = tok:apply_chat_template(messages, { add_generation_prompt = true, tokenize = false })
  local ids = tok:encode(prompt, { add_special_tokens = false })
  local pieces = {}
  local ok, message = pcall(function()
    for piece in model:stream(tok, ids, options) do
      pieces[#pieces + 1] = piece
      cli.out(piece)
    end
  end)
  cli.out "\n"
  if not ok then
    if not cli.interrupted() then error(message, 0) end
    cli.settle()
  end
  return table.concat(pieces)
end

cli.run(parser, function(args)
  if args.json then cli.usage "--json: a conversation has no single result; use `wane generate`" end
  local options = { max_new_tokens = args.max_new_tokens or 512, do_sample = args.sample or nil, temperature = args.temperature, top_k = args.top_k,
                    top_p = args.top_p, repetition_penalty = args.repetition_penalty, seed = args.seed }
  local model, tok = cli.load_model(args)
  if not tok then cli.fail("%s has no tokenizer that wane reads (%s)", args.model, tostring(model.tokenizer_error)) end
  if terminal then terminal.limit(3) end
  local read = reader()
  local function opening() return args.system and { { role = "system", content = args.system } } or {} end
  local messages = opening()
  while true do
    local line = read()
    if not line or line == "/quit" then break end
    if line == "/reset" then
      messages = opening()
    elseif line:find "%S" then
      messages[#messages + 1] = { role = "user", content = line }
      messages[#messages + 1] = { role = "assistant", content = answer(model, tok, messages, options) }
    end
  end
  if not interactive then return end
  cli.out "\n"
end)
