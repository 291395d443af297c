-- A config.json may say anything: what cannot be a model's is an error of one sentence, at once.
local core = require "wane.core"
local cjson = require "cjson"
local mutate = require "spec.support.mutate"
local models = require "wane.models"

local function config(name)
  local f = assert(io.open("spec/fixtures/models/" .. name .. "/config.json"))
  local text = f:read "*a"
  f:close()
  return cjson.decode(text), text
end

local function refused(name, changes, words)
  local c = config(name)
  for k, v in pairs(changes) do c[k] = v end
  local started = core.C.wane_clock()
  local tree, message, code = models.build(c)
  assert.is_nil(tree, words)
  assert.is_true(code == "WANE_E_FORMAT" or code == "WANE_E_UNSUPPORTED")
  assert.matches(words, message, 1, true)
  assert.is_nil(message:find("%.lua:%d"), message)
  assert.is_true(core.C.wane_clock() - started < 1)
end

describe("a config", function()
  it("that is larger than any model, or negative, or no number, is refused by name", function()
    refused("llama", { num_hidden_layers = 30000000 }, "num_hidden_layers must be a whole number from 1 to 4096")
    refused("llama", { hidden_size = -5 }, "hidden_size must be")
    refused("llama", { hidden_size = 1e300 }, "hidden_size must be")
    refused("llama", { intermediate_size = true }, "intermediate_size must be a whole number from 1 to 2147483647, found a boolean")
    refused("llama", { rms_norm_eps = "x" }, "rms_norm_eps must be a number above 0, found 'x'")
    refused("llama", { num_attention_heads = 1.5 }, "num_attention_heads must be")
    refused("gptj", { n_head = 7 }, "no multiple of 7 attention heads")
    refused("llama", { num_key_value_heads = 3 }, "cannot share 3 key-value heads")
    refused("llama3", { rope_parameters = { rope_type = "llama3", rope_theta = 1e4, factor = "x" } }, "rope_parameters.factor must be")
    refused("gpt2", { n_inner = {} }, "intermediate_size must be")
    refused("mistral", { sliding_window = -1 }, "sliding_window must be")
    refused("mixtral", { num_local_experts = 1e9 }, "num_local_experts must be")
    refused("mixtral", { num_experts_per_tok = 99 }, "num_experts_per_tok is 99")
    refused("t5", { num_decoder_layers = 0 }, "num_decoder_layers must be")
    refused("t5", { relative_attention_max_distance = -1 }, "relative_attention_max_distance must be")
    local neox = config "gpt_neox"
    local odd = 3.5 / (neox.hidden_size / neox.num_attention_heads)          -- three dimensions of each head
    refused("gpt_neox", { rope_parameters = { rope_type = "default", rope_theta = 1e4, partial_rotary_factor = odd } }, "turns pairs")
    refused("llama", { architectures = 5, model_type = cjson.null }, "no family for architecture '5'")
  end)

  it("with learned positions is told when a sequence outgrows them", function()
    local model = assert(require("wane").load("spec/fixtures/models/gpt2", { tokenizer = false }))
    local most = model.config.max_position_embeddings
    local prompt = {}
    for i = 1, most - 2 do prompt[i] = i % 50 end
    local ok, message = pcall(model.generate, model, { prompt }, { max_new_tokens = 8, ignore_eos = true })
    assert.is_false(ok)
    assert.matches(("learned positions for %d"):format(most), message, 1, true)
    model:close()
  end)

  it("of any kind of damage is built or refused, 10,000 times", function()
    local sources = {}
    for _, name in ipairs { "llama3", "gpt_neox", "bloom", "gpt2", "opt_350", "t5", "mixtral", "qwen3_moe", "gemma3", "falcon", "phi3" } do
      sources[#sources + 1] = select(2, config(name))
    end
    mutate.run { name = "configs", sources = sources, words = mutate.json_words, bytes = 512 * 2 ^ 20, try = function(_, bytes)
      local ok, c = pcall(cjson.decode, bytes)
      if not ok or type(c) ~= "table" then return nil, "no JSON", "WANE_E_FORMAT" end
      local tree, message, code = models.build(c)
      if not tree then return nil, message, code end
      return true
    end }
  end)
end)
