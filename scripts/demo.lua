--- The Lua side of scripts/demo: loads a model as NF4 with double quantization, answers a prompt, prints the figures.
local cli = require "wane.cli"

local parser = cli.parser("demo", "Loads a model as NF4 with double quantization and answers a prompt.")
parser:argument "model"
parser:argument("prompt", "What to ask."):args "?"

-- Bytes of the weights as they lie in the file: a process of its own, so that its memory does not count here.
local function footprint_before(path)
  local program = _G.arg[-1] or "wane"
  local quoted = "'" .. path:gsub("'", "'\\''") .. "'"
  local pipe = io.popen(program .. [[ -e 'local m = assert(require("wane").load((...), { tokenizer = false })); print(m:memory_footprint())' ]] .. quoted)
  local bytes = tonumber(pipe:read "*a")
  pipe:close()
  return bytes
end

cli.run(parser, function(args)
  local core = require "wane.core"
  local clock = core.C.wane_clock
  local before = footprint_before(args.model) or cli.fail("%s could not be loaded", args.model)
  args.quant, args.double_quant, args.skip = "nf4", true, {}
  local model, tok, load_s = cli.load_model(args)
  local footprint = model:memory_footprint()
  print(("model      %s, %s"):format(args.model:match "[^/]*/*$", model.config.model_type or "?"))
  print(("footprint  %s as the file stores it, %s as NF4 with double quantization (%.2f s to load and quantize)"):format(
    cli.bytes(before), cli.bytes(footprint), load_s))
  print(("machine    %s, %s, %d threads\n"):format(require("ffi").string(core.C.wane_cpu_name()),
    require("ffi").string(core.C.wane_cpu_level_name(core.C.wane_cpu_level())), core.C.wane_threads()))

  local question = args.prompt or "Why is the sky blue? Answer in a few sentences."
  local prompt = tok.chat_template and tok:apply_chat_template({ { role = "user", content = question } }, { add_generation_prompt = true, tokenize = false })
    or question
  local ids = tok:encode(prompt, { add_special_tokens = not tok.chat_template })
  print("> " .. question)
  local started, first, pieces = clock(), nil, 0
  local out, run = require("wane.generate").stream(model, tok, ids, { max_new_tokens = 120 })
  run.on_token = function()
    first = first or clock()
    pieces = pieces + 1
  end
  for piece in out do cli.out(piece) end
  local finished = clock()
  print(("\n\nfirst token after %.2f s (%d tokens of prompt), then %.1f tokens/s; peak memory %s"):format(
    (first or finished) - started, #ids, pieces > 1 and (pieces - 1) / (finished - first) or 0, cli.bytes(require("wane").memory().rss_peak)))
end)
