-- Bad files and wrong arguments: a clear message and a code, never a crash; what cannot be read is refused by name.
local support = require "support.text"
local tokenizer = require "wane.tokenizer"
local core = require "wane.core"
local cjson = require "cjson"

local function load_text(text, name)
  local folder, gone = support.folder()
  support.write(folder .. "/" .. (name or "tokenizer.json"), text)
  local tok, message, code = tokenizer.load(name and folder .. "/" .. name or folder)
  gone()
  return tok, message, code
end

--- A tokenizer.json with `change` applied to a small valid one.
local function with(change)
  local json = {
    version = "1.0",
    added_tokens = { { id = 3, content = "<s>", special = true, normalized = false, lstrip = false, rstrip = false, single_word = false } },
    model = { type = "BPE", vocab = { a = 0, b = 1, ab = 2 }, merges = { { "a", "b" } } },
  }
  change(json)
  return cjson.encode(json)
end

local function with_split(pattern, behavior)
  return with(function(j) j.pre_tokenizer = { type = "Split", pattern = pattern, behavior = behavior, invert = false } end)
end

describe("tokenizer, bad files", function()
  local cases = {
    { "an empty file", "", "empty", "FORMAT" },
    { "no JSON", "hello", "no valid JSON", "FORMAT" },
    { "a truncated file", '{"model": {"vocab": {"a": 0', "no valid JSON", "FORMAT" },
    { "something behind the end", with(function() end) .. "{}", "no valid JSON", "FORMAT" },
    { "a list", "[1]", "an object was expected", "FORMAT" },
    { "a git-lfs pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git%-lfs pointer", "FORMAT" },
    { "no model", "{}", "has no model", "FORMAT" },
    { "no vocabulary", '{"model": {"type": "BPE", "merges": []}}', "vocab is missing", "FORMAT" },
    { "a token listed twice", '{"model": {"type": "BPE", "vocab": {"a": 0, "a": 1}, "merges": []}}', "'a' is there twice", "FORMAT" },
    { "an id given twice", '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}', "two tokens have the id 0", "FORMAT" },
    { "two vocabularies", '{"model": {"vocab": {"a": 0}, "vocab": {"b": 0}}}', "'vocab' is there twice", "FORMAT" },
    { "two normalizers", '{"normalizer": null, "normalizer": null, "model": {}}', "'normalizer' is there twice", "FORMAT" },
    { "a negative id", '{"model": {"vocab": {"a": -1}}}', "has the id %-1", "FORMAT" },
    { "a fractional id", '{"model": {"vocab": {"a": 1.5}}}', "has the id 1.5", "FORMAT" },
    { "a huge id", '{"model": {"vocab": {"a": 99999999999}}}', "out of range", "FORMAT" },
    { "an id of 20 digits", '{"model": {"vocab": {"a": 99999999999999999999}}}', "has the id 9999", "FORMAT" },
    { "an id that is a string", '{"model": {"vocab": {"a": "0"}}}', "a string in model.vocab", "FORMAT" },
    { "a merge of unknown tokens", with(function(j) j.model.merges[2] = { "b", "c" } end), "names a token that the vocabulary does not have", "FORMAT" },
    { "a merge of one token", with(function(j) j.model.merges[2] = { "b" } end), "fewer than two", "FORMAT" },
    { "a merge of three tokens", with(function(j) j.model.merges[2] = { "a", "b", "c" } end), "third token", "FORMAT" },
    { "a merge line without a space", with(function(j) j.model.merges[1] = "ab" end), "one space between", "FORMAT" },
    { "an added token without content", with(function(j) j.added_tokens[1].content = nil end), "without content", "FORMAT" },
    { "an unknown token that is not there", with(function(j) j.model.unk_token = "<unk>" end), "'<unk>' is not in the vocabulary", "FORMAT" },
    { "nesting without end", ("["):rep(1000), "nested deeper", "FORMAT" },
    { "an unknown normalizer", with(function(j) j.normalizer = { type = "Nmt" } end), "normalizer 'Nmt'", "UNSUPPORTED" },
    { "an unknown pre-tokenizer", with(function(j) j.pre_tokenizer = { type = "BertPreTokenizer" } end), "'BertPreTokenizer'", "UNSUPPORTED" },
    { "an unknown decoder", with(function(j) j.decoder = { type = "CTC" } end), "'CTC'", "UNSUPPORTED" },
    { "an unknown post-processor", with(function(j) j.post_processor = { type = "X" } end), "'X'", "UNSUPPORTED" },
    { "a pattern that is none", with_split({ Regex = "(" }, "Isolated"), "pattern '%('", "FORMAT" },
    { "a pattern of another kind", with_split({ Glob = "*" }, "Isolated"), "Split.pattern", "FORMAT" },
    { "a behavior that is none", with_split({ String = "x" }, "Often"), "'Often'", "FORMAT" },
    { "a template with an unknown token", with(function(j)
      j.post_processor = { type = "TemplateProcessing", single = { { SpecialToken = { id = "<x>", type_id = 0 } } }, pair = {}, special_tokens = {} }
    end), "'<x>' is not described", "FORMAT" },
    { "a template with an id that is none", with(function(j)
      j.post_processor = { type = "TemplateProcessing", single = { { SpecialToken = { id = "<s>", type_id = 0 } } }, pair = {},
        special_tokens = { ["<s>"] = { id = "<s>", ids = { 77 }, tokens = { "<s>" } } } }
    end), "no token has the id 77", "NOTFOUND" },
  }
  for _, c in ipairs(cases) do
    it(c[1], function()
      local tok, message, code = load_text(c[2])
      assert.is_nil(tok)
      assert.matches(c[3], message)
      assert.equal("WANE_E_" .. c[4], code)
    end)
  end

  it("refuses Unigram and WordPiece by name", function()
    for kind, name in pairs { t5_nfkc = "Unigram", bert = "WordPiece" } do
      local tok, message, code = tokenizer.load(support.fixtures .. kind)
      assert.is_nil(tok)
      assert.matches("'" .. name .. "'", message)
      assert.equal("WANE_E_UNSUPPORTED", code)
    end
  end)

  it("says what was looked for where nothing is", function()
    for _, path in ipairs { "/nonexistent", "spec", "/" } do
      local tok, message, code = tokenizer.load(path)
      assert.is_nil(tok)
      assert.matches("tokenizer.json", message)
      assert.equal("WANE_E_NOTFOUND", code)
    end
    local tok, message = load_text("{}", "vocab.json")
    assert.is_nil(tok)
    assert.matches("model", message)
  end)

  it("refuses GGUF files that lie about their sizes", function()
    local good = support.gguf { { "tokenizer.ggml.model", "gpt2" }, { "tokenizer.ggml.tokens", { type = "string", "a", "b" } },
                                { "tokenizer.ggml.merges", { type = "string", "a b" } } }
    for n = 0, #good - 1 do
      local tok, message = load_text(good:sub(1, n), "x.gguf")
      assert.is_nil(tok)
      assert.is_true(#message > 0)
    end
    local tok, message = load_text(good:gsub("\2%z%z%z%z%z%z%z\1", "\255\255\255\255\255\255\255\127\1", 1), "x.gguf")
    assert.is_nil(tok)
    assert.matches("truncated", message)
    tok, message = load_text("GGUF\1" .. good:sub(6), "x.gguf")
    assert.is_nil(tok)
    assert.matches("version 1", message)
  end)
end)

describe("tokenizer, wrong arguments", function()
  local tok
  setup(function() tok = assert(tokenizer.load(support.fixtures .. "gpt2")) end)
  local function fails(pattern, fn, ...)
    local ok, message = pcall(function(...) fn(...) end, ...)
    assert.is_false(ok)
    assert.matches("errors_spec.lua:%d+: .*" .. pattern, message)
  end

  it("are errors at the caller's line", function()
    fails("a path was expected, found a nil", tokenizer.load)
    fails("a string was expected, found a nil", tok.encode, tok)
    fails("a string was expected, found a table", tok.encode, tok, {})
    fails("call it with a colon", tok.encode, "text")
    fails("pair must be a string", tok.encode, tok, "a", { pair = 1 })
    fails("a list of ids was expected", tok.decode, tok, 3)
    fails("ids%[2%] is x, no id", tok.decode, tok, { 1, "x" })
    fails("ids%[1%] is 1.5", tok.decode, tok, { 1.5 })
    fails("ids%[1%] is nan", tok.decode, tok, { 0 / 0 })
    fails("a string was expected", tok.id_of, tok, 1)
    fails("an id was expected", tok.token_of, tok, "a")
  end)

  it("ids without a token decode to nothing, texts without an id have none", function()
    assert.equal("", tok:decode { -1, 100000, 2147483647 })
    assert.is_nil(tok:token_of(-1))
    assert.is_nil(tok:token_of(tok.vocab_size))
    assert.is_nil(tok:token_of(0 / 0))
    assert.is_nil(tok:id_of "no such token")
    assert.equal(0, tok:id_of "<|endoftext|>")
  end)

  it("reads invalid UTF-8 as replacement characters, NUL as a character", function()
    assert.equal("a\239\191\189b", tok:decode(tok:encode "a\255b"))
    assert.equal("a\239\191\189", tok:decode(tok:encode "a\240\159\152"))
    assert.equal("a\0b", tok:decode(tok:encode "a\0b"))
  end)

  it("a closed tokenizer says so, and may be closed again", function()
    local other = assert(tokenizer.load(support.fixtures .. "gpt2"))
    other:close()
    other:close()
    fails("is closed", other.encode, other, "a")
    assert.equal("Tokenizer(closed)", tostring(other))
  end)

  it("loading and encoding survive every failing allocation, and leave nothing behind", function()
    tok:encode "warm"
    local C, text = core.C, ("Hello <tool> wörld 123\n"):rep(500)
    for _, path in ipairs { support.fixtures .. "gpt_neox", support.fixtures .. "llama2" } do
      collectgarbage()
      collectgarbage()
      local before, n = require("wane").memory().heap, 0
      while true do
        n = n + 1
        C.wane_fail_allocation(n)
        local ok, t, message = pcall(tokenizer.load, path)
        assert.is_true(ok)                              -- files and memory: nil, message
        local encoded, decoded, ids
        if t then encoded, ids = pcall(t.encode, t, text) message = ids end
        if encoded then decoded, message = pcall(t.decode, t, ids) end
        C.wane_fail_allocation(0)
        if t then t:close() end
        if decoded then break end
        assert.matches("out of memory", message)
        assert.is_true(n < 5000)
      end
      assert.is_true(n > 50)
      -- A job's memory goes when its thread has left, which may be a moment later.
      local started = C.wane_clock()
      repeat collectgarbage() until require("wane").memory().heap <= before or C.wane_clock() - started > 5
      assert.is_true(require("wane").memory().heap <= before)
    end
  end)
end)
