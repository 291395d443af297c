--- wane evaluate: perplexity of a text.
local cli = require "wane.cli"

local parser = cli.parser("evaluate", "Perplexity of a text under a model.")
cli.model_options(parser)
parser:option("--text", "File with the text (default: stdin).")
parser:option("--convention", "hf: sliding windows; llama.cpp: the second half of each window."):choices { "hf", "llama.cpp" }:default "hf"
parser:option("--ctx", "Ids in a window (hf: what the model was trained for, at most 2048; llama.cpp: 512)."):convert(cli.count)
parser:option("--stride", "hf: ids from one window to the next (ctx)."):convert(cli.count)
parser:option("--max-windows", "Stop after this many windows."):convert(cli.count)
parser:option("--task", "Not part of this version yet.")
parser:option("--data", "Not part of this version yet.")

cli.run(parser, function(args)
  if args.task or args.data then cli.later("--task", "evaluation tasks") end
  if not args.model then cli.usage "--model is missing: a folder or a .gguf file" end
  local text
  if args.text then
    local f = cli.check(io.open(args.text, "rb"))
    text = f:read "*a"
    f:close()
  else
    text = cli.stdin "--text"
  end
  local model, tok = cli.load_model(args)
  if not tok then cli.fail("%s has no tokenizer that wane reads (%s)", args.model, tostring(model.tokenizer_error)) end
  local ids = tok:encode(text, { add_special_tokens = args.convention == "llama.cpp" })
  local progress = cli.progress("evaluating", "windows")
  local wane = require "wane"
  local started = wane.core.C.wane_clock()
  local result = wane.evaluate.perplexity(model, ids, {
    convention = args.convention, ctx = args.ctx, stride = args.stride, max_windows = args.max_windows,
    bos = args.convention == "llama.cpp" and tok.add_bos and tok.bos_id or nil,
    progress = function(windows) progress:update(windows, args.max_windows) end,
  })
  progress:finish()
  result.seconds = wane.core.C.wane_clock() - started
  result.peak_rss_bytes = wane.memory().rss_peak
  -- The loop in transformers' docs weights windows a little differently when they overlap: told under its own name.
  result.perplexity_transformers_docs, result.documentation = result.documentation, nil
  if args.json then return cli.json(result) end
  print(("perplexity %.4f ± %.4f (%s convention, ctx %d%s): %d tokens in %d windows, nll %.5f, %s"):format(result.perplexity, result.stderr, result.convention,
    result.ctx, result.stride and result.stride ~= result.ctx and ", stride " .. result.stride or "", result.tokens,
    result.windows, result.nll, cli.seconds(result.seconds)))
end)
