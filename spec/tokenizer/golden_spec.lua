-- Every case that Hugging Face's tokenizers computed for the BPE kinds: ids, tokens, decoded text, streams, pairs: exactly.
local support = require "support.text"
local tokenizer = require "wane.tokenizer"
local cjson = require "cjson"

describe("tokenizer, golden data", function()
  for _, kind in ipairs(support.kinds) do
    describe(kind, function()
      local tok
      setup(function() tok = assert(tokenizer.load(support.fixtures .. kind)) end)
      teardown(function() tok:close() end)
      local cases = support.json(kind, "cases.json")

      it(("gives the ids and tokens of all %d texts"):format(#cases), function()
        for _, c in ipairs(cases) do
          local ids, details = tok:encode(c.text, { details = true })
          assert.same(c.ids, ids, c.text)
          assert.same(c.tokens, details.tokens, c.text)
          assert.same(c.ids_without_special, tok:encode(c.text, { add_special_tokens = false }), c.text)
        end
      end)

      it(("decodes the ids of all %d texts"):format(#cases), function()
        for _, c in ipairs(cases) do
          assert.equal(c.decoded, tok:decode(c.ids))
          assert.equal(c.decoded_skip_special, tok:decode(c.ids, { skip_special_tokens = true }))
        end
      end)

      local streams = support.json(kind, "stream.json")
      it(("streams %d sequences piece by piece as upstream does"):format(#streams), function()
        for _, s in ipairs(streams) do
          local stream = tok:decode_stream { skip_special_tokens = s.skip_special_tokens }
          for i, id in ipairs(s.ids) do
            local expected = s.pieces[i]
            if expected == cjson.null then expected = nil end
            assert.equal(expected, (stream:step(id)))
          end
        end
      end)

      it("a stream's pieces and its end are the decoded text", function()
        for _, s in ipairs(streams) do
          local stream, out = tok:decode_stream { skip_special_tokens = s.skip_special_tokens }, {}
          for _, id in ipairs(s.ids) do out[#out + 1] = stream:step(id) end
          out[#out + 1] = stream:finish()
          assert.equal(tok:decode(s.ids, { skip_special_tokens = s.skip_special_tokens }), table.concat(out))
        end
      end)

      it("encodes pairs of texts", function()
        for _, p in ipairs(support.json(kind, "pairs.json")) do
          local ids, details = tok:encode(p.a, { pair = p.b, details = true })
          assert.same(p.ids, ids)
          assert.same(p.type_ids, details.type_ids)
        end
      end)

      it("encodes a long text on a job as it does on the calling thread", function()
        local all = {}
        for _, c in ipairs(cases) do all[#all + 1] = c.text end
        local long = table.concat(all, "\n"):rep(3)
        assert.is_true(#long > 8192)
        local ids = tok:encode(long, { add_special_tokens = false })
        local ffi, core = require "ffi", require "wane.core"
        local box = ffi.new "wane_encoding *[1]"
        assert.equal(0, core.C.wane_tokenizer_encode(tok.handle, box, long, #long))
        assert.equal(tonumber(core.C.wane_encoding_count(box[0])), #ids)
        for i = 1, #ids do assert(core.C.wane_encoding_ids(box[0])[i - 1] == ids[i]) end
        core.C.wane_encoding_free(box[0])
      end)
    end)
  end
end)
