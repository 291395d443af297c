--- wane quantize: writes a quantized copy of a model in bitsandbytes' own layout.
local cli = require "wane.cli"

local parser = cli.parser("quantize", "Writes a quantized copy of a model: a folder in bitsandbytes' layout, which transformers and wane both load.")
cli.model_options(parser)
parser:option("--out", "Folder to write.")
parser:option("--dtype", "Of what is not quantized: f32, f16, bf16 (default: as stored)."):choices { "f32", "f16", "bf16" }
parser:option("--max-shard-size", "Larger files are split (5GB)."):convert(cli.size)
parser:flag("--report", "Each layer's error: relative Frobenius norm, largest and mean difference.")

-- Errors of the layers, collected while they are written.
local function reporter(wane, ckpt, layers)
  return function(name, tensor, entry)
    local source = cli.check(require("wane.loader").load(ckpt, { { entry = entry, dtype = "f32" } }))[1]
    local e = wane.quant.error(source, tensor)
    source:close()
    layers[#layers + 1] = { name = name, type = tensor:dtype(), block_size = tensor:info().block_size, rel_error = e.rel_frobenius,
                            max_error = e.max_abs, mean_error = e.mean_abs }
  end
end

local function print_layers(layers)
  local rows = { { "layer", "type", "rel. error", "max error", "mean error" } }
  for _, l in ipairs(layers) do
    rows[#rows + 1] = { l.name, l.type, ("%.5f"):format(l.rel_error), ("%.5f"):format(l.max_error), ("%.6f"):format(l.mean_error) }
  end
  print(cli.columns(rows))
end

-- Bytes of the weights in a folder.
local function weight_bytes(wane, folder)
  local paths, total = require "wane.checkpoint.paths", 0
  local ckpt = cli.check(wane.checkpoint.open(folder))
  for _, file in ipairs(ckpt.index:files()) do total = total + (paths.stat(file) or 0) end
  ckpt:close()
  return total
end

-- What the user should know about the folder besides its size.
local function remarks(args, result, report, format)
  if result.resumed > 0 then cli.note("%d of %d shards were finished by an earlier run and kept", result.resumed, result.shards) end
  for _, pattern in ipairs(result.unused) do cli.note("the rule '%s' matches no layer (wane inspect lists them)", pattern) end
  for _, entry in ipairs(result.unused_skip) do cli.note("--skip %s matches no layer (wane inspect lists them)", entry) end
  if result.quantized == 0 then cli.note "nothing is quantized: the rules or the skip list leave out every layer" end
  if result.left_out > 0 then
    cli.note("the text part alone is written, as a text model; %d tensors of the other parts (vision) are left out", result.left_out)
  end
  if result.upstream then cli.note("transformers cannot load this folder: %s; wane can", result.upstream) end
  if result.tokenizer_error then cli.note("no tokenizer was written: %s", result.tokenizer_error) end
  if format == "gguf" and report.out_bytes > report.in_bytes and not args.dtype then
    cli.note("the copy is larger: GGUF blocks that stay unquantized are written as their exact float32 values; --dtype bf16 halves them")
  end
end

cli.run(parser, function(args)
  if not args.model then cli.usage "--model is missing: a folder or a .gguf file" end
  if not args.out then cli.usage "--out is missing: the folder to write" end
  if #args.lora > 0 then cli.usage "--lora: an adapter stays a folder of its own beside the quantized model (wane.lora.merge merges one into weights)" end
  if args.max_shard_size and args.max_shard_size < 1 then cli.usage "--max-shard-size: a size above 0 was expected" end
  local options = cli.load_options(args)
  if not options.quant then cli.usage "--quant is missing: nf4, fp4, int8 or int8-blockwise (or --rules FILE)" end
  local wane = require "wane"
  if args.threads then wane.threads(args.threads) end
  local clock = wane.core.C.wane_clock
  local started = clock()
  local ckpt = cli.check(wane.checkpoint.open(args.model))
  local progress, layers = cli.progress("quantizing " .. args.model:match "[^/]*/*$"), {}
  local result = cli.check(wane.checkpoint.write_quantized(args.out, {
    checkpoint = ckpt, scheme = options.quant, dtype = args.dtype, max_shard_bytes = args.max_shard_size, cancelled = cli.interrupted,
    on_tensor = args.report and reporter(wane, ckpt, layers) or nil, progress = function(...) progress:update(...) end,
  }))
  progress:finish()
  table.sort(layers, function(a, b) return a.name < b.name end)
  local report = { in_bytes = result.bytes, out_bytes = weight_bytes(wane, args.out), seconds = clock() - started,
    peak_rss_bytes = wane.memory().rss_peak, shards = result.shards, resumed = result.resumed, layers = args.report and layers or nil }
  remarks(args, result, report, ckpt.format)
  if args.json then return cli.json(report) end
  if args.report then print_layers(layers) end
  print(("%s -> %s (%s): %s -> %s in %s, peak memory %s"):format(args.model, args.out, args.quant or "rules", cli.bytes(report.in_bytes),
    cli.bytes(report.out_bytes), cli.seconds(report.seconds), cli.bytes(report.peak_rss_bytes)))
end)
