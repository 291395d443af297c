--- Made-up checkpoints of any size: a Llama whose weights are holes in a sparse file, all zero, so that they take no disk.
local files = require "support.files"

local M = {}

--- Writes config.json and model.safetensors (float16) of a Llama shape.
-- @param dir string there already
-- @param shape table { layers, hidden, intermediate, vocabulary }
-- @return number bytes of the weights
function M.llama(dir, shape)
  local H, I, V = shape.hidden, shape.intermediate, shape.vocabulary
  local fields, at = {}, 0
  local function tensor(name, ...)
    local bytes = 2
    for _, size in ipairs { ... } do bytes = bytes * size end
    fields[#fields + 1] = ('"%s":{"dtype":"F16","shape":[%s],"data_offsets":[%d,%d]}'):format(name, table.concat({ ... }, ","), at, at + bytes)
    at = at + bytes
  end
  tensor("model.embed_tokens.weight", V, H)
  for i = 0, shape.layers - 1 do
    local layer = ("model.layers.%d."):format(i)
    for _, name in ipairs { "q", "k", "v", "o" } do tensor(layer .. "self_attn." .. name .. "_proj.weight", H, H) end
    tensor(layer .. "mlp.gate_proj.weight", I, H)
    tensor(layer .. "mlp.up_proj.weight", I, H)
    tensor(layer .. "mlp.down_proj.weight", H, I)
    tensor(layer .. "input_layernorm.weight", H)
    tensor(layer .. "post_attention_layernorm.weight", H)
  end
  tensor("model.norm.weight", H)
  tensor("lm_head.weight", V, H)
  local header = "{" .. table.concat(fields, ",") .. "}"
  header = header .. (" "):rep(-#header % 8)
  files.write(dir .. "/model.safetensors", files.u64(#header) .. header)
  assert(os.execute(("truncate -s %d '%s/model.safetensors'"):format(8 + #header + at, dir)) == 0)
  files.write(dir .. "/config.json", ([[{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": %d, "intermediate_size": %d,
    "num_hidden_layers": %d, "num_attention_heads": 16, "vocab_size": %d, "tie_word_embeddings": false, "torch_dtype": "float16"}]]):format(
    H, I, shape.layers, V))
  return at
end

return M
