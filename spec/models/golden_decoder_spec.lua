-- Llama's relatives against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"

local where = { embed = "model.embed_tokens", layer = "model.layers.%d", final = "model.norm" }
for _, name in ipairs { "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe", "phi3_long" } do golden.check(name, where) end
