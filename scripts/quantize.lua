--- wane quantize: writes a quantized copy of a model in bitsandbytes' own layout.
local cli = require "wane.cli"

local parser = cli.parser("quantize", "Writes a quantized copy of a model: a folder in bitsandbytes' layout, which transformers and wane both load.")
cli.model_options(parser)
parser:option("--out", "Folder to write.")
parser:option("--dtype", "Of what is not quantized: f32, f16, bf16 (default: as stored)."):choices { "f32", "f16", "bf16" }
parser:option("--max-shard-size", "Larger files are split (5GB)."):convert(cli.size)
parser:flag("--report", "Each layer's error: relative Frobenius norm and largest difference.")

cli.run(parser, function(args)
  if not args.model then cli.usage "--model is missing: a folder or a .gguf file" end
  if not args.out then cli.usage "--out is missing: the folder to write" end
  if not args.quant or args.quant == "none" then cli.usage "--quant is missing: nf4, fp4, int8 or int8-blockwise" end
  local options = cli.load_options(args)
  local wane = require "wane"
  if args.threads then wane.threads(args.threads) end
  local scheme = require("wane.load").scheme(options.quant)
  local clock = wane.core.C.wane_clock
  local started = clock()
  local ckpt = cli.check(wane.checkpoint.open(args.model))
  local progress = cli.progress("quantizing " .. args.model:match "[^/]*/*$")
  local layers = {}
  local function on_tensor(name, tensor, entry)
    if not (args.report and tensor:dtype() == scheme.type) then return end
    local source = cli.check(require("wane.loader").load(ckpt, { { entry = entry, dtype = "f32" } }))[1]
    local e = wane.quant.error(source, tensor)
    source:close()
    layers[#layers + 1] = { name = name, type = scheme.type, rel_error = e.rel_frobenius, max_error = e.max_abs, mean_error = e.mean_abs }
  end
  local result = cli.check(wane.checkpoint.write_quantized(args.out, {
    checkpoint = ckpt, scheme = scheme, dtype = args.dtype, max_shard_bytes = args.max_shard_size,
    on_tensor = on_tensor, progress = function(...) progress:update(...) end,
  }))
  progress:finish()
  local function size_of(path)
    local f = io.open(path, "rb")
    if not f then return 0 end
    local n = f:seek "end"
    f:close()
    return n
  end
  local out_bytes = 0
  local index = wane.checkpoint.open(args.out)
  if index then
    for _, file in ipairs(index.index:files()) do out_bytes = out_bytes + size_of(file) end
    index:close()
  end
  local seconds = clock() - started
  local report = { in_bytes = result.bytes, out_bytes = out_bytes, seconds = seconds,
    peak_rss_bytes = wane.memory().rss_peak, layers = args.report and layers or nil }
  if args.json then return cli.json(report) end
  if out_bytes > result.bytes and not args.dtype then
    cli.note("the copy is larger: GGUF blocks that stay unquantized are written as their exact float32 values; --dtype bf16 halves them")
  end
  if args.report then
    local rows = { { "layer", "rel. error", "max error", "mean error" } }
    for _, l in ipairs(layers) do rows[#rows + 1] = { l.name, ("%.5f"):format(l.rel_error), ("%.5f"):format(l.max_error), ("%.6f"):format(l.mean_error) } end
    print(cli.columns(rows))
  end
  print(("%s -> %s (%s): %s -> %s in %s, peak memory %s"):format(args.model, args.out, scheme.type, cli.bytes(result.bytes), cli.bytes(out_bytes),
    cli.seconds(seconds), cli.bytes(report.peak_rss_bytes)))
end)
