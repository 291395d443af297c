--- Figures of this machine: each scheme's products at each instruction-set level, and whole models, as shares of limits measured in
-- the same run.
--
-- Decode (one row) is bound by reading the weights once: its limit is the read probe, taken before and after because memory bandwidth
-- moves on shared machines. Prefill (512 rows) is bound by multiply-adds: its limit is the level's own probe. The weights of a scheme
-- together do not fit any cache, and each is read in turn.
-- @module wane.bench
local ffi = require "ffi"
local core = require "wane.core"
local Tensor = require "wane.tensor"
local F = require "wane.nn.functional"
local C, check, stream = core.C, core.check, core.stream

local M = {}

--- Median of a list.
function M.median(list)
  local copy = {}
  for i, v in ipairs(list) do copy[i] = v end
  table.sort(copy)
  local n = #copy
  return n % 2 == 1 and copy[(n + 1) / 2] or (copy[n / 2] + copy[n / 2 + 1]) / 2
end

--- Seconds that fn's ops take, from an idle stream to an idle stream.
local function timed(fn)
  check(core.wait())
  local started = C.wane_clock()
  fn()
  check(core.wait())
  return C.wane_clock() - started
end

-- ---------------------------------------------------------------- limits

--- A u8 tensor for the read probe, in the same kind of memory (pooled, huge pages) as weights.
-- @param bytes number
function M.buffer(bytes)
  return F.outside_scopes(function()
    local shape, n = core.shape { bytes }
    local h = core.handle_type()
    check(C.wane_tensor_new(stream(), h, C.WANE_U8, n, shape))
    return Tensor.wrap(h)
  end)
end

local probe_ops = ffi.new "double[1]"

--- Bytes a second that all workers read together from a buffer larger than any cache: median of 5.
-- @param buffer wane.Tensor u8
function M.read_rate(buffer)
  local rates = {}
  for i = 1, 5 do
    local t = timed(function() check(C.wane_probe(stream(), C.WANE_PROBE_READ, buffer.h, 0, probe_ops)) end)
    rates[i] = probe_ops[0] / t
  end
  return M.median(rates)
end

--- Operations a second of a probe at the level in force; nil where the level has none.
function M.compute_rate(what)
  local rounds, rates = 20000, {}
  for i = 1, 4 do
    local t = timed(function() check(C.wane_probe(stream(), what, nil, rounds, probe_ops)) end)
    if probe_ops[0] == 0 then return nil end
    rates[i] = probe_ops[0] / t
    if i == 1 then rounds = math.max(1000, math.floor(rounds * 0.1 / t)) end
  end
  table.remove(rates, 1)
  return M.median(rates)
end

--- What the machine is and can do. buffer: u8 tensor for the read probe.
function M.machine(buffer)
  local level = C.wane_cpu_level()
  return {
    cpu = ffi.string(C.wane_cpu_name()), isa = ffi.string(C.wane_cpu_level_name(level)), best_isa = ffi.string(C.wane_cpu_level_name(C.wane_cpu_best())),
    notes = ffi.string(C.wane_cpu_notes()), threads = C.wane_threads(), read_bytes_per_s = M.read_rate(buffer),
    f32_ops_per_s = M.compute_rate(C.WANE_PROBE_F32), bf16_ops_per_s = M.compute_rate(C.WANE_PROBE_BF16), i8_ops_per_s = M.compute_rate(C.WANE_PROBE_I8),
  }
end

-- ---------------------------------------------------------------- weights

-- GGUF blocks with random codes and sane scales: values, bytes a block, offsets of its f16 scales.
local gguf = {
  q4_0 = { 32, 18, { 0 } }, q8_0 = { 32, 34, { 0 } }, q4_k = { 256, 144, { 0, 2 } }, q6_k = { 256, 210, { 208 } },
}

local function gguf_weight(kind, rows, cols)
  local g = gguf[kind]
  local n = rows * cols / g[1]
  local bytes = ffi.new("uint8_t[?]", n * g[2])
  local state = 12345
  for i = 0, n * g[2] - 1 do
    state = (state * 1103515245 + 12345) % 2147483648
    bytes[i] = math.floor(state / 65536) % 256
  end
  for b = 0, n - 1 do
    for _, at in ipairs(g[3]) do bytes[b * g[2] + at], bytes[b * g[2] + at + 1] = 0x00, 0x14 end   -- f16 0.00098
  end
  local codes = F.upload(bytes, C.WANE_U8, n * g[2], rows, cols / g[1] * g[2])
  local parts = ffi.new("const wane_handle *[6]")
  parts[0] = codes.h
  local h, shape = core.handle_type(), ffi.new("int64_t[2]", rows, cols)
  check(C.wane_quantized_new(stream(), h, core.dtype(kind), 2, shape, 0, 0, parts))
  return Tensor.wrap(h)
end

local function random(seed, dtype, ...)
  local shape, n = core.shape { ... }
  local h = core.handle_type()
  check(C.wane_random(stream(), h, C.WANE_NORMAL, 0, 0.05, seed, 0, dtype, n, shape))
  return Tensor.wrap(h)
end

local function quantized(x, kind, block_size, nested)
  local h = core.handle_type()
  check(C.wane_quantize(stream(), h, x.h, core.dtype(kind), block_size, nested and 1 or 0))
  return Tensor.wrap(h)
end

-- name, weight maker, compute, threshold, probe that limits its prefill at this scheme's arithmetic
local schemes = {
  { "f32", function(r, c, s) return random(s, C.WANE_F32, r, c) end, C.WANE_COMPUTE_F32 },
  { "bf16", function(r, c, s) return random(s, C.WANE_BF16, r, c) end, C.WANE_COMPUTE_BF16 },
  { "f16", function(r, c, s) return random(s, C.WANE_F16, r, c) end, C.WANE_COMPUTE_BF16 },
  { "nf4", function(r, c, s) return quantized(random(s, C.WANE_F32, r, c), "nf4", 64) end, C.WANE_COMPUTE_BF16 },
  { "nf4-dq", function(r, c, s) return quantized(random(s, C.WANE_F32, r, c), "nf4", 64, true) end, C.WANE_COMPUTE_BF16 },
  { "nf4-f32", function(r, c, s) return quantized(random(s, C.WANE_F32, r, c), "nf4", 64) end, C.WANE_COMPUTE_F32 },
  { "fp4", function(r, c, s) return quantized(random(s, C.WANE_F32, r, c), "fp4", 64) end, C.WANE_COMPUTE_BF16 },
  { "int8", function(r, c, s) return quantized(random(s, C.WANE_F32, r, c), "int8", 0) end, C.WANE_COMPUTE_BF16, 6.0 },
  { "int8-blockwise", function(r, c, s) return quantized(random(s, C.WANE_F32, r, c), "int8-blockwise", 4096) end, C.WANE_COMPUTE_BF16 },
  { "q4_0", function(r, c) return gguf_weight("q4_0", r, c) end, C.WANE_COMPUTE_BF16 },
  { "q8_0", function(r, c) return gguf_weight("q8_0", r, c) end, C.WANE_COMPUTE_BF16 },
  { "q4_k", function(r, c) return gguf_weight("q4_k", r, c) end, C.WANE_COMPUTE_BF16 },
  { "q6_k", function(r, c) return gguf_weight("q6_k", r, c) end, C.WANE_COMPUTE_BF16 },
}
M.scheme_names = {}
for i, s in ipairs(schemes) do M.scheme_names[i] = s[1] end

--- Activations [rows, cols]; for LLM.int8() with outlier columns, 0.3 % of them, of magnitude 20 to 60: without them it measures nothing.
local function activations(rows, cols, outliers)
  local x = random(99, C.WANE_F32, rows, cols)
  x = F.binary_scalar(x, 20, C.WANE_MUL)
  if outliers then
    for i = 1, math.max(1, math.floor(cols * 0.003 + 0.5)) do
      check(C.wane_fill(stream(), F.narrow(x, 1, (i * 613) % cols, 1).h, (i % 2 == 0 and -1 or 1) * (20 + 40 * i / (cols * 0.003))))
    end
  end
  return x
end

local info = core.info_type()
local function bytes_of(t)
  check(C.wane_tensor_info(t.h, info))
  return tonumber(info.nbytes)
end

-- ---------------------------------------------------------------- one scheme at one level

--- Decode and prefill of a scheme at the level in force.
-- @param name string
-- @param o table { rows, cols, set_bytes (of weights), prefill (rows of x) }
-- @return table { decode_bytes_per_s, prefill_ops_per_s, weight_bytes }
function M.scheme(name, o)
  for _, s in ipairs(schemes) do
    if s[1] == name then
      return core.scope(function()
        local weights, first = {}, s[2](o.rows, o.cols, 1)
        weights[1] = first
        local each = bytes_of(first)
        for i = 2, math.max(1, math.ceil(o.set_bytes / each)) do
          weights[i] = core.scope(s[2], o.rows, o.cols, i)
          if i % 4 == 0 then check(core.wait()) end
        end
        local threshold = s[4] or -1
        local function pass(x)
          for i = 1, #weights do F.linear(x, weights[i], nil, s[3], threshold):close() end
        end
        local one, many = activations(1, o.cols, s[4]), activations(o.prefill, o.cols, s[4])
        local decode, prefill = {}, {}
        pass(one)
        for i = 1, o.repeats do decode[i] = #weights * each / timed(function() pass(one) end) end
        local few = math.min(#weights, o.prefill_weights or 4)
        local function prefill_pass() for i = 1, few do F.linear(many, weights[i], nil, s[3], threshold):close() end end
        prefill_pass()
        for i = 1, o.repeats do prefill[i] = 2 * o.rows * o.cols * o.prefill * few / timed(prefill_pass) end
        return { decode_bytes_per_s = M.median(decode), prefill_ops_per_s = M.median(prefill), weight_bytes = each, weights = #weights }
      end)
    end
  end
  core.raise("bench: there is no scheme '%s': %s", tostring(name), table.concat(M.scheme_names, ", "))
end

-- ---------------------------------------------------------------- whole models

--- Llama shapes with random weights.
M.shapes = {
  ["1.1b"] = { hidden_size = 2048, intermediate_size = 5632, num_hidden_layers = 22, num_attention_heads = 32, num_key_value_heads = 4, vocab_size = 32000,
    max_position_embeddings = 2048, tie_word_embeddings = false },
  ["135m"] = { hidden_size = 576, intermediate_size = 1536, num_hidden_layers = 30, num_attention_heads = 9, num_key_value_heads = 3, vocab_size = 49152,
    max_position_embeddings = 2048, tie_word_embeddings = true },
}

--- A Llama of one of M.shapes, every Linear but the head in `scheme`, the rest bf16.
-- @param shape string
-- @param scheme table|nil
function M.random_model(shape, scheme)
  local config = { architectures = { "LlamaForCausalLM" }, model_type = "llama" }
  for k, v in pairs(M.shapes[shape] or core.raise("bench: there is no shape '%s': 1.1b, 135m", tostring(shape))) do config[k] = v end
  local tree = assert(require("wane.models").build(config))
  local seed = 0
  for path, module in tree:modules() do
    for _, p in ipairs(module:own_parameters()) do
      seed = seed + 1
      if path ~= "lm_head" or not config.tie_word_embeddings then
        core.scope(function()
          local quantize = scheme and module.in_features and path ~= "lm_head"
          local x = random(seed, (#p.shape == 1 or quantize) and C.WANE_F32 or C.WANE_BF16, unpack(p.shape))
          if quantize then x = quantized(x, scheme.type, scheme.block_size or 64, scheme.double_quant) end
          module[p.name] = x
          if quantize and scheme.type == "int8" then module.threshold = scheme.threshold or 6.0 end
          return x
        end)
      end
    end
    check(core.wait())
  end
  if config.tie_word_embeddings then tree.lm_head.weight = tree.model.embed_tokens.weight end
  return require("wane.model").new(tree):set_compute "bf16"
end

--- Bytes of weights that one token reads: everything but the rows of the embedding that it does not touch.
local function bytes_a_token(model)
  local bytes = model:memory_footprint()
  if not model.config.tie_word_embeddings then bytes = bytes - bytes_of(model:find(model.family.embedding).weight) end
  return bytes
end

--- Prefill and decode of a model.
-- @param model wane.Model
-- @param o table { prompt = ids, new = tokens, repeats }
-- @return table { prefill_tokens_per_s, decode_tokens_per_s, decode_bytes_per_s, bytes_per_token }
function M.model(model, o)
  local ids = {}
  for i = 1, o.prompt do ids[i] = (i * 7919) % model.config.vocab_size end
  local prefill, decode = {}, {}
  for i = 1, o.repeats do
    local run = require("wane.generate").start(model, { ids }, { max_new_tokens = o.new, ignore_eos = true })
    check(core.wait())
    local started = C.wane_clock()
    run:next()
    local first = C.wane_clock()
    for _ = 2, o.new do run:next() end
    local ended = C.wane_clock()
    run:close()
    prefill[i], decode[i] = o.prompt / (first - started), (o.new - 1) / (ended - first)
  end
  local bytes = bytes_a_token(model)
  local rate = M.median(decode)
  return { prefill_tokens_per_s = M.median(prefill), decode_tokens_per_s = rate, decode_bytes_per_s = rate * bytes, bytes_per_token = bytes }
end

return M
