--- What a model will need, from its config alone: parameters, bytes under a scheme, memory to load, to generate and to train. No
-- weights are read, so a model far larger than this machine can be planned.
--
--     local plan = assert(wane.plan.of(config, { quant = { type = "nf4", double_quant = true }, context = 2048 }))
--     print(plan.parameters, plan.weights_bytes, plan.generate_bytes)
--
-- Weights are counted exactly. The rest is a bound from the shapes of what wane allocates; each formula stands at its place.
-- @module wane.plan
local core = require "wane.core"
local count = require "wane.lora.count"
local load = require "wane.load"
local models = require "wane.models"
local targets = require "wane.lora.targets"

local M = {}

-- A process with the library, its Lua and a loader's chunks in flight: measured, 64 MB of overhead are the bar of a load.
local PROCESS = 64e6
local widths = { f32 = 4, f16 = 2, bf16 = 2 }
local long = { float32 = "f32", float16 = "f16", bfloat16 = "bf16" }

-- ---------------------------------------------------------------- weights

--- Bytes of n values of a weight [rows, n / rows] under a scheme, scales included.
-- @param n integer values
-- @param rows integer
-- @param scheme table from wane.load's schemes
-- @return integer
function M.quantized_bytes(n, rows, scheme)
  if scheme.type == "int8" then return n + rows * 4 end
  local blocks = math.ceil(n / scheme.block_size)
  if scheme.type == "int8-blockwise" then return n + blocks * 4 + 256 * 4 end
  local codes = math.ceil(n / 2)
  if not scheme.double_quant then return codes + blocks * 4 end
  return codes + blocks + math.ceil(blocks / 256) * 4 + 256 * 4 + 4
end

-- dtype in which the files most likely are: what the config says, else float16, in which the large checkpoints are published.
local function stored_dtype(config, wanted)
  if wanted then return wanted end
  local said = tostring(config.dtype or config.torch_dtype or "float16"):gsub("^torch%.", "")
  return long[said] or "f32"
end

-- Calls fn(path, module, parameter, n) for every parameter that is held: a tied head is the embedding's.
local function each_parameter(tree, fn)
  local family = tree.family
  for path, module in tree:modules() do
    for _, p in ipairs(module:own_parameters()) do
      local tied = path == family.head and p.name == "weight" and tree.config.tie_word_embeddings ~= false
      if not tied then fn(path, module, p, count.numel(p.shape)) end
    end
  end
end

-- Sums over the weights: parameters, bytes, and the count that peft prints (a 4-bit weight counts its packed bytes).
local function weights(tree, scheme, dtype)
  local skip = scheme and load.skip_list(scheme, tree.family)
  local sum = { parameters = 0, bytes = 0, packed = 0, quantized = 0 }
  each_parameter(tree, function(path, module, p, n)
    sum.parameters = sum.parameters + n
    local quantized = scheme and p.name == "weight" and module.in_features and not load.skipped(path, skip)
    if quantized then
      sum.quantized = sum.quantized + n
      sum.bytes = sum.bytes + M.quantized_bytes(n, p.shape[1], scheme)
    else
      sum.bytes = sum.bytes + n * (#p.shape == 1 and 4 or widths[dtype])       -- norms and biases are held as f32
    end
    sum.packed = sum.packed + count.held(n, quantized and scheme.type or dtype)
  end)
  return sum
end

-- ---------------------------------------------------------------- generating

-- Sizes that all families' configs have once their defaults are filled in.
local function sizes(c)
  local heads = c.num_attention_heads
  return {
    hidden = c.hidden_size, layers = c.num_hidden_layers, vocab = c.vocab_size, heads = heads,
    width = (c.num_key_value_heads or heads) * (c.head_dim or c.hidden_size / heads),
    inner = c.intermediate_size or 4 * c.hidden_size,
  }
end

-- Keys and values of every layer, [batch, heads, context, head_dim] each, in bf16 (f32 where products are f32); an encoder-decoder
-- keeps those of the encoder's result as well.
local function cache_bytes(tree, s, batch, context, element)
  local stacks = tree.config.is_encoder_decoder and 2 or 1
  return stacks * s.layers * 2 * batch * context * s.width * element
end

-- Temporaries of one layer over a slice of at most 1024 rows (wane_linear cuts there), f32: x, its norm, q k v, the attention's result
-- and the MLP's three widths, the packed operand; and one row of logits a sequence.
local function pass_bytes(s, batch, context)
  local rows = math.min(batch * context, 1024)
  return rows * (6 * s.hidden + 4 * s.inner) * 4 + batch * s.vocab * 4
end

-- ---------------------------------------------------------------- training

-- A trainable value: itself, its gradient, two 8-bit moments with a scale per 256. Activations with a checkpoint a block: one hidden state a
-- layer, and what one block keeps while it is run again: its norms, heads, scores' sums and MLP. Logits go through the loss in slices of
-- 1024 rows, with their gradient.
local function train_bytes(s, trainable, rows)
  local moments = 2 * (1 + 4 / 256)
  local kept = rows * s.hidden * 4 * s.layers + rows * (10 * s.hidden + 5 * s.inner) * 4
  return trainable * (4 + 4 + moments) + kept + 2 * math.min(rows, 1024) * s.vocab * 4
end

-- ---------------------------------------------------------------- plan

--- The plan of a config under a scheme.
-- @param config table config.json's fields
-- @param o table|nil { quant = scheme as wane.load takes it, dtype = "f32" | "f16" | "bf16" of what is not quantized (default: the config's),
--   context = 2048 tokens (or the config's longest, where that is less), batch = 1,
--   lora = { r = 8, target_modules = PEFT's default of the family } }
-- @return table|nil { family, parameters, dtype, weights_bytes, load_bytes, context, batch, cache_bytes, generate_bytes, trainable, all, train_bytes };
--   all: what peft's print_trainable_parameters calls so. string|nil message, string|nil code
function M.of(config, o)
  o = o or {}
  local tree, message, code = models.build(config)
  if not tree then return nil, message, code end
  local scheme = load.scheme(o.quant)
  local s = sizes(tree.config)
  local dtype = stored_dtype(config, o.dtype)
  if not widths[dtype] then core.raise("plan: dtype is f32, f16 or bf16, found '%s'", tostring(dtype)) end
  local w = weights(tree, scheme, dtype)
  local context, batch = o.context or math.min(2048, tree.config.max_position_embeddings or 2048), o.batch or 1
  local element = (scheme == nil and dtype == "f32") and 4 or 2
  local plan = { family = tree.family.name, parameters = w.parameters, quantized = w.quantized, dtype = dtype, context = context, batch = batch }
  plan.weights_bytes = w.bytes
  plan.load_bytes = w.bytes + PROCESS
  plan.cache_bytes = cache_bytes(tree, s, batch, context, element)
  plan.generate_bytes = plan.load_bytes + plan.cache_bytes + pass_bytes(s, batch, context)
  local lora = o.lora or {}
  local wanted = lora.target_modules or targets.defaults[tree.family.name]
  if wanted then
    local found, unused, reason = targets.match(tree, { target_modules = wanted })
    if not found then return nil, "plan: " .. unused, reason end
    plan.trainable = 0
    for _, target in ipairs(found) do plan.trainable = plan.trainable + count.part(target.module, lora.r or 8) end
    plan.target_modules, plan.all = wanted, w.packed + plan.trainable
    plan.train_bytes = plan.load_bytes + train_bytes(s, plan.trainable, batch * context)
  end
  return plan
end

return M
