-- Normalizers, pre-tokenizers, decoders and added tokens that the golden kinds do not use, against Hugging Face's library.
local support = require "support.text"
local tokenizer = require "wane.tokenizer"
local cjson = require "cjson"

describe("tokenizer variants", function()
  for _, v in ipairs(cjson.decode(support.read(support.fixtures .. "variants.json"))) do
    it(("%s: %d texts"):format(v.name, #v.cases), function()
      local json = support.json(v.base, "tokenizer.json")
      for key, value in pairs(v.model) do json.model[key] = value end
      for key, value in pairs(v.top) do json[key] = value end
      for _, token in ipairs(v.added) do table.insert(json.added_tokens, token) end
      local folder, gone = support.folder()
      support.write(folder .. "/tokenizer.json", cjson.encode(json))
      local tok = assert(tokenizer.load(folder))
      gone()
      for _, c in ipairs(v.cases) do
        local ids, details = tok:encode(c.text, { details = true })
        assert.same(c.ids, ids, c.text)
        assert.same(c.tokens, details.tokens, c.text)
        assert.equal(c.decoded, tok:decode(c.ids))
      end
    end)
  end
end)
