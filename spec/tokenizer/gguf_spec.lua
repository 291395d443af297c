-- Tokenizers from GGUF metadata: the fixtures' vocabularies written as GGUF give the ids of their tokenizer.json, and SmolLM2's
-- real file gives transformers' ids.
local support = require "support.text"
local tokenizer = require "wane.tokenizer"
local cjson = require "cjson"

--- The metadata of a fixture's tokenizer.json. Scores: a token is worth the more, the earlier the merge that makes it.
local function metadata(kind, model, pre)
  local json, config = support.json(kind, "tokenizer.json"), support.json(kind, "tokenizer_config.json")
  local added, tokens, types, n = {}, { type = "string" }, { type = "int" }, 0
  for _, a in ipairs(json.added_tokens) do added[a.id] = a end
  for token, id in pairs(json.model.vocab) do tokens[id + 1] = token n = math.max(n, id + 1) end
  for id, a in pairs(added) do tokens[id + 1] = a.content n = math.max(n, id + 1) end
  local id_of = {}
  for i = 1, n do
    id_of[tokens[i]] = i - 1
    local a = added[i - 1]
    types[i] = a and (a.special and 3 or 4) or tokens[i]:find "^<0x%x%x>$" and 6 or 1
  end
  local merges, scores = { type = "string" }, { type = "float" }
  for i = 1, n do scores[i] = -1e6 end
  for i, m in ipairs(json.model.merges) do
    merges[i] = m[1] .. " " .. m[2]
    scores[id_of[m[1] .. m[2]] + 1] = -i
  end
  local out = {
    { "general.architecture", "llama" }, { "some.other.list", { type = "string", "a", "b" } }, { "tokenizer.ggml.model", model },
    { "tokenizer.ggml.tokens", tokens }, { "tokenizer.ggml.token_type", types },
  }
  if model == "llama" then out[#out + 1] = { "tokenizer.ggml.scores", scores } else out[#out + 1] = { "tokenizer.ggml.merges", merges } end
  if pre then out[#out + 1] = { "tokenizer.ggml.pre", pre } end
  for key, name in pairs { bos_token = "bos", eos_token = "eos", unk_token = "unknown", pad_token = "padding" } do
    if config[key] then out[#out + 1] = { "tokenizer.ggml." .. name .. "_token_id", id_of[config[key]] } end
  end
  return out
end

local function load_metadata(list)
  local path = support.write(os.tmpname(), support.gguf(list))
  local tok, message, code = tokenizer.load(path)
  os.remove(path)
  return tok, message, code
end

describe("tokenizer from GGUF", function()
  for _, c in ipairs {
    { "bloom", "gpt2", "bloom" }, { "llama3", "gpt2", "llama-bpe" }, { "qwen2", "gpt2", "qwen2" }, { "llama2", "llama" },
  } do
    local kind, model, pre = c[1], c[2], c[3]
    local cases = support.json(kind, "cases.json")
    it(("%s: the ids and texts of %d cases, as from its tokenizer.json"):format(kind, #cases), function()
      local tok = assert(load_metadata(metadata(kind, model, pre)))
      local json = assert(tokenizer.load(support.fixtures .. kind))
      assert.equal(json.vocab_size, tok.vocab_size)
      assert.equal(json.bos_id, tok.bos_id)
      assert.same(json.eos_id, tok.eos_id)
      for _, case in ipairs(cases) do
        assert.same(case.ids, tok:encode(case.text), case.text)
        assert.equal(case.decoded, tok:decode(case.ids))
        assert.equal(case.decoded_skip_special, tok:decode(case.ids, { skip_special_tokens = true }))
      end
    end)
  end

  it("gpt2: the cases without the fixture's own added tokens", function()
    local tok, n = assert(load_metadata(metadata("gpt2", "gpt2", "gpt-2"))), 0
    for _, case in ipairs(support.json("gpt2", "cases.json")) do
      -- GGUF keeps neither lstrip, rstrip nor single_word.
      if not case.text:find "hello" and not case.text:find "[<>]" and not case.text:find "Ünïted" then
        n = n + 1
        assert.same(case.ids, tok:encode(case.text), case.text)
      end
    end
    assert.is_true(n > 150)
  end)

  it("obeys add_bos_token, add_eos_token and add_space_prefix", function()
    local list = metadata("llama2", "llama")
    local text, plain = "Hello", assert(load_metadata(list)):encode("Hello", { add_special_tokens = false })
    list[#list + 1] = { "tokenizer.ggml.add_bos_token", false }
    list[#list + 1] = { "tokenizer.ggml.add_eos_token", true }
    local ids = assert(load_metadata(list)):encode(text)
    assert.equal(2, ids[#ids])
    assert.equal(plain[1], ids[1])
    list[#list + 1] = { "tokenizer.ggml.add_space_prefix", false }
    local tok = assert(load_metadata(list))
    assert.equal("Hello", tok:decode(tok:encode("Hello", { add_special_tokens = false })))
    assert.is_nil(tok:token_of(tok:encode(text)[1]):find("▁", 1, true))
  end)

  it("names what it does not support", function()
    local list = metadata("gpt2", "gpt2", "no-such-family")
    local tok, message, code = load_metadata(list)
    assert.is_nil(tok)
    assert.equal("WANE_E_UNSUPPORTED", code)
    assert.matches("no%-such%-family", message)
    assert.matches("llama%-bpe", message)
    list = metadata("gpt2", "t5")
    tok, message, code = load_metadata(list)
    assert.is_nil(tok)
    assert.equal("WANE_E_UNSUPPORTED", code)
    assert.matches("'t5'", message)
    tok, message, code = load_metadata { { "general.architecture", "llama" } }
    assert.is_nil(tok)
    assert.equal("WANE_E_NOTFOUND", code)
    assert.matches("tokenizer.ggml.tokens", message)
  end)

  describe("SmolLM2-135M-Instruct", function()
    local path = support.real_model()
    local function real(name, fn)
      it(name, function()
        if not path then return pending "the model is not there: scripts/fetch-model fetches it" end
        fn(assert(tokenizer.load(path)), cjson.decode(support.read "spec/fixtures/real/smol135.json"))
      end)
    end

    real("gives transformers' ids for the five prompts and decodes the five answers", function(tok, golden)
      for _, g in ipairs(golden.gen.f32) do
        assert.same(g.prompt_ids, tok:encode(g.prompt))
        assert.equal(g.text, tok:decode(g.ids))
      end
    end)

    real("gives transformers' ids for the Apache licence: the first 64, and how many", function(tok, golden)
      local f = io.open("/usr/share/common-licenses/Apache-2.0", "rb")
      if not f then return pending "Debian's common-licenses is not there" end
      local text = f:read "*a"
      f:close()
      local ids = tok:encode(text)
      assert.equal(golden.n_tokens_text, #ids)
      for i, id in ipairs(golden.ids_head) do assert.equal(id, ids[i]) end
      assert.equal(text, tok:decode(ids))
    end)

    real("knows its special tokens and its ChatML template", function(tok)
      assert.equal(1, tok.bos_id)
      assert.same({ 2 }, tok.eos_id)
      assert.equal(49152, tok.vocab_size)
      assert.equal("<|im_end|>", tok:token_of(2))
      assert.is_true(tok:is_special(2))
      assert.equal("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n" ..
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        tok:apply_chat_template({ { role = "user", content = "Hi" } }, { add_generation_prompt = true, tokenize = false }))
      local ids = tok:apply_chat_template { { role = "system", content = "Be brief." }, { role = "user", content = "Hi" } }
      assert.equal("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n", tok:decode(ids))
      assert.equal(1, ids[1])
    end)
  end)
end)
