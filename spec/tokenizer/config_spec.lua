-- tokenizer_config.json: which class it names, which tokens, which surroundings, against transformers 4.
local support = require "support.text"
local tokenizer = require "wane.tokenizer"
local cjson = require "cjson"

describe("tokenizer_config.json", function()
  for _, v in ipairs(cjson.decode(support.read(support.fixtures .. "classes.json"))) do
    it(("%s: %d texts"):format(v.name, #v.cases), function()
      local json, config = support.json(v.base, "tokenizer.json"), support.json(v.base, "tokenizer_config.json")
      for key, value in pairs(v.top) do json[key] = value end
      for key, value in pairs(v.pre_tokenizer) do json.pre_tokenizer[key] = value end
      for key, value in pairs(v.config) do
        if value == cjson.null then value = nil end
        config[key] = value
      end
      local folder, gone = support.folder()
      support.write(folder .. "/tokenizer.json", cjson.encode(json))
      support.write(folder .. "/tokenizer_config.json", cjson.encode(config))
      local tok = assert(tokenizer.load(folder))
      gone()
      local function is(expected, found)
        if expected == cjson.null then assert.is_nil(found) else assert.equal(expected, found) end
      end
      is(v.bos, tok.bos_id)
      is(v.eos, tok.eos_id[1])
      is(v.pad, tok.pad_id)
      assert.equal(v.tokens, tok.vocab_size)
      for _, c in ipairs(v.cases) do
        assert.same(c.ids, tok:encode(c.text), c.text)
        assert.same(c.ids_without_special, tok:encode(c.text, { add_special_tokens = false }), c.text)
      end
      local with, without = v.cases[1].ids, v.cases[1].ids_without_special
      assert.equal(#with > #without and with[1] == v.bos, tok.add_bos)
      assert.equal(#with > #without and with[#with] == v.eos and with[#with] ~= without[#without], tok.add_eos)
    end)
  end

  it("is not needed, and special_tokens_map.json can stand in for it", function()
    local folder, gone = support.folder()
    support.write(folder .. "/tokenizer.json", support.read(support.fixtures .. "llama2/tokenizer.json"))
    local tok = assert(tokenizer.load(folder))
    assert.is_nil(tok.bos_id)
    assert.same({}, tok.eos_id)
    assert.same({ 1, 1042, 327, 720, 337 }, tok:encode "Hello")
    support.write(folder .. "/special_tokens_map.json", '{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    tok = assert(tokenizer.load(folder .. "/tokenizer.json"))
    assert.equal(1, tok.bos_id)
    assert.same({ 2 }, tok.eos_id)
    support.write(folder .. "/special_tokens_map.json", "{")
    local nothing, message, code = tokenizer.load(folder)
    gone()
    assert.is_nil(nothing)
    assert.matches("special_tokens_map.json", message)
    assert.equal("WANE_E_FORMAT", code)
  end)

  it("finds the chat template where newer files keep it", function()
    local tok = assert(tokenizer.load(support.fixtures .. "gemma"))
    assert.equal(support.read(support.fixtures .. "gemma/chat_template.jinja"), tok.chat_template)
  end)
end)
