-- Llama and GPT-NeoX against transformers; what is compared is in spec/support/golden.lua.
local cjson = require "cjson"
local golden = require "spec.support.golden"
local wane = require "wane"

local llama = { embed = "model.embed_tokens", layer = "model.layers.%d", final = "model.norm" }
local gpt_neox = { embed = "gpt_neox.embed_in", layer = "gpt_neox.layers.%d", final = "gpt_neox.final_layer_norm" }
golden.check("llama", llama)
golden.check("llama3", llama)
golden.check("gpt_neox", gpt_neox)
golden.check("gpt_neox_seq", gpt_neox)

local function read_json(path)
  local f = assert(io.open(path))
  local text = f:read "*a"
  f:close()
  return cjson.decode(text)
end

describe("memory_footprint", function()
  for _, name in ipairs { "llama/nf4-dq-bf16", "llama/fp4-f32", "llama/int8", "gpt_neox/nf4-dq-bf16", "gpt_neox/fp4-f32", "gpt_neox/int8" } do
    it("of " .. name .. ": transformers' own figure on request", function()
      local folder = "spec/fixtures/quant/checkpoints/" .. name
      local model = assert(wane.load(folder, { tokenizer = false }))
      local expected = read_json(folder .. "/expected.json").memory_footprint
      assert.equal(expected, model:memory_footprint "transformers")
      assert.is_true(model:memory_footprint() > expected)
      assert.equal(1, select("#", model:memory_footprint()))
      model:close()
    end)
  end
end)
