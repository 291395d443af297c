--- wane: large language models made small, from Lua.
--
--     local wane = require "wane"
--     local model, tok = assert(wane.load("SmolLM2-135M-Instruct.gguf", { quant = "nf4" }))
--     for piece in model:stream(tok, "The quick brown fox") do io.write(piece) end
-- @module wane
local core = require "wane.core"

local M = { core = core, version = require("ffi").string(core.C.wane_version()) }

-- Parts are loaded when first used: wane.quant, wane.nn, wane.models, …
local parts = { quant = true, nn = true, models = true, tokenizer = true, checkpoint = true, generate = true, evaluate = true, plan = true, hub = true,
  lora = true, autograd = true, optim = true, train = true }
local Tensor = require "wane.tensor"
M.Tensor = Tensor

setmetatable(M, { __index = function(t, key)
  local value
  if parts[key] then
    value = require("wane." .. key)
  elseif Tensor.constructors and Tensor.constructors[key] then
    value = Tensor.constructors[key]
  end
  rawset(t, key, value)
  return value
end })

M.scope = core.scope

--- Loads a model: its name in the local Hugging Face cache (org/name, org/name@revision), a Hugging Face folder (safetensors or
-- pytorch_model.bin), a .gguf file, a folder quantized by bitsandbytes or wane.
-- Weights that the files lack are an error; missing = "allow" makes new ones, as transformers does. model.report lists them, and the
-- tensors of the files that the model has no use for: { missing = string[], unexpected = string[] }.
-- @param path string
-- @param opts table|nil { quant = "nf4" | { type, block_size, double_quant, compute, skip, threshold }, compute, progress, io, tokenizer = false,
--   missing = "error" | "allow", variant = nil | "fp16",
--   lora = "adapter" | { "adapter", name = "other" … }: adapter folders, all active }. A folder that holds an adapter alone is loaded with its base.
-- @return wane.Model|nil model, wane.Tokenizer|string tok or message, string|nil code
function M.load(path, opts) return require("wane.load").load(path, opts) end

--- Number of worker threads; results never depend on it.
-- @param n integer|nil sets it (0: default)
-- @return integer
function M.threads(n)
  if n then core.check(core.C.wane_set_threads(n)) end
  return core.C.wane_threads()
end

--- Memory of the process and of the library, in bytes.
-- @return table { heap, heap_peak, mapped, limit, rss, rss_peak, tensors, allocations }
function M.memory()
  local m = require("ffi").new "wane_memory"
  core.C.wane_memory_read(m)
  local out = {}
  for _, k in ipairs { "heap", "heap_peak", "mapped", "limit", "rss", "rss_peak", "tensors", "allocations" } do out[k] = tonumber(m[k]) end
  return out
end

return M
