--- wane bench: this machine's figures, as shares of limits measured in the same run.
local cli = require "wane.cli"

local parser = cli.parser("bench", "Products of every scheme at every instruction-set level, and whole models, as shares of measured limits.")
parser:option("--schemes", "Comma-separated; default: all.")
parser:option("--levels", "Comma-separated instruction-set levels; default: every one this CPU has above generic.")
parser:option("--model", "Also this model: a folder, a .gguf file, or a shape with random NF4 weights: 1.1b, 135m."):count "*"
parser:option("--shape", "Rows x columns of the weights (5632x2048)."):default "5632x2048"
parser:option("--prompt", "Tokens of a model's prefill (512)."):convert(cli.count):default "512"
parser:option("--new", "Tokens of a model's decode (64)."):convert(cli.count):default "64"
parser:option("--repeats", "Median of this many (5)."):convert(cli.count):default "5"
parser:option("--threads", "Workers (default: what affinity and cgroups allow)."):convert(cli.count)
parser:flag("--quick", "Smaller sets: a first impression in seconds.")

local function words(text)
  local list = {}
  for w in text:gmatch "[^,]+" do list[#list + 1] = w end
  return list
end

cli.run(parser, function(args)
  local wane, core = require "wane", require "wane.core"
  local bench, C = require "wane.bench", core.C
  if args.threads then wane.threads(args.threads) end
  local rows, cols = args.shape:match "^(%d+)x(%d+)$"
  if not rows then cli.usage("--shape: expected ROWSxCOLUMNS, found '%s'", args.shape) end
  local set = args.quick and 64e6 or 192e6
  local o = { rows = tonumber(rows), cols = tonumber(cols), set_bytes = set, prefill = 512, repeats = args.quick and 3 or args.repeats }
  local buffer = bench.buffer(args.quick and 128e6 or 512e6)
  core.check(C.wane_fill(core.stream(), buffer.h, 1))
  local best = C.wane_cpu_level()
  local machine = bench.machine(buffer)
  local results = {}
  local function add(name, value, unit, limit)
    results[#results + 1] = { name = name, value = value, unit = unit, limit = limit, share = limit and value / limit or nil }
  end
  local function show(r)
    if args.json then return end
    local scale, unit = 1e9, r.unit == "bytes/s" and "GB/s" or r.unit == "ops/s" and "GFLOP/s" or r.unit
    if unit == r.unit then scale = 1 end
    print(("%-44s %10.2f %-9s %s"):format(r.name, r.value / scale, unit, r.share and ("%5.1f %% of %.1f"):format(100 * r.share, r.limit / scale) or ""))
  end
  if not args.json then
    print(("%s, %s, %d thread(s); read %.1f GB/s"):format(machine.cpu, machine.isa, machine.threads, machine.read_bytes_per_s / 1e9))
  end
  local levels = args.levels and words(args.levels)
  if not levels then
    levels = {}
    for level = 1, best do levels[#levels + 1] = require("ffi").string(C.wane_cpu_level_name(level)) end
  end
  for _, name in ipairs(levels) do
    local level
    for i = 0, 4 do if require("ffi").string(C.wane_cpu_level_name(i)) == name then level = i end end
    if not level then cli.usage("--levels: there is no '%s'", name) end
    core.check(C.wane_set_cpu_level(level))
    local f32, bf16, i8 = bench.compute_rate(C.WANE_PROBE_F32), bench.compute_rate(C.WANE_PROBE_BF16), bench.compute_rate(C.WANE_PROBE_I8)
    local float = math.max(f32 or 0, bf16 or 0)
    for _, scheme in ipairs(args.schemes and words(args.schemes) or bench.scheme_names) do
      local read = bench.read_rate(buffer)
      local r = bench.scheme(scheme, o)
      read = (read + bench.read_rate(buffer)) / 2
      local compute = (scheme == "f32" or scheme == "nf4-f32") and f32 or scheme == "int8" and i8 or float
      add(("%s %s decode"):format(name, scheme), r.decode_bytes_per_s, "bytes/s", read)
      show(results[#results])
      add(("%s %s prefill %d"):format(name, scheme, o.prefill), r.prefill_ops_per_s, "ops/s", compute)
      show(results[#results])
    end
    C.wane_stream_trim(core.stream(), 1e6)
  end
  core.check(C.wane_set_cpu_level(best))
  for _, path in ipairs(args.model) do
    local model
    if bench.shapes[path] then model = bench.random_model(path, { type = "nf4" }) else model = cli.check(wane.load(path, { tokenizer = false })) end
    local read = bench.read_rate(buffer)
    local r = bench.model(model, { prompt = args.prompt, new = args.new, repeats = math.min(o.repeats, 3) })
    read = (read + bench.read_rate(buffer)) / 2
    add(path .. " decode", r.decode_tokens_per_s, "tokens/s", read / r.bytes_per_token)
    show(results[#results])
    add(("%s prefill %d"):format(path, args.prompt), r.prefill_tokens_per_s, "tokens/s")
    show(results[#results])
    model:close()
  end
  machine.read_bytes_per_s_after = bench.read_rate(buffer)
  machine.peak_rss_bytes = wane.memory().rss_peak
  if args.json then cli.json { machine = machine, results = results } else
    print(("read %.1f GB/s afterwards; peak memory %s"):format(machine.read_bytes_per_s_after / 1e9, cli.bytes(machine.peak_rss_bytes)))
  end
end)
