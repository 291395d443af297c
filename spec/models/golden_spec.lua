-- Llama and GPT-NeoX against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"

local llama = { embed = "model.embed_tokens", layer = "model.layers.%d", final = "model.norm" }
local gpt_neox = { embed = "gpt_neox.embed_in", layer = "gpt_neox.layers.%d", final = "gpt_neox.final_layer_norm" }
golden.check("llama", llama)
golden.check("llama3", llama)
golden.check("gpt_neox", gpt_neox)
golden.check("gpt_neox_seq", gpt_neox)
