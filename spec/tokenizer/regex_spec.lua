-- Oniguruma's syntax to PCRE2's. What the patterns match is seen in golden_spec; here: the translation and its limits.
local regex = require "wane.tokenizer.regex"
local tokenizer = require "wane.tokenizer"
local support = require "support.text"
local cjson = require "cjson"

local SPACE = [[\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]]

--- A tokenizer whose tokens are the bytes, cut by a pattern: its tokens show the pieces, because ignore_merges finds whole pieces only.
local function pieces(pattern, text, behavior, invert)
  local vocab, n = {}, 0
  local function add(word) if not vocab[word] then vocab[word] = n n = n + 1 end end
  for b = 32, 126 do add(string.char(b)) end
  for _, c in ipairs { "\n", "\t", "é", "ß", "K", "²", "日", "本", "▁", "ſ", "İ", "\195\151" } do add(c) end
  -- Every part of the text is a token.
  local at = {}
  for i in text:gmatch "()[%z\1-\127\194-\244]" do at[#at + 1] = i end
  at[#at + 1] = #text + 1
  for i = 1, #at do for j = i + 1, #at do add(text:sub(at[i], at[j] - 1)) end end
  local folder, gone = support.folder()
  support.write(folder .. "/tokenizer.json", cjson.encode {
    model = { type = "BPE", vocab = vocab, merges = {}, ignore_merges = true },
    pre_tokenizer = { type = "Split", pattern = { Regex = pattern }, behavior = behavior or "Isolated", invert = invert or false },
  })
  local tok, message = tokenizer.load(folder)
  gone()
  if not tok then return nil, message end
  local _, details = tok:encode(text, { details = true })
  tok:close()
  return details.tokens
end

describe("tokenizer.regex", function()
  it("translates classes, escapes and quantifiers", function()
    local cases = {
      { [=[ ?[^(\s|[.,!?…。，、।۔،])]+]=], " ?[^(" .. SPACE .. "|.,!?…。，、।۔،)]+" },
      { [[\s+(?!\S)]], "[" .. SPACE .. "]+(?![^" .. SPACE .. "])" },
      { [=[[a-z&&[^aeiou]]+]=], "(?:(?=[a-z])[^aeiou])+" },
      { [=[[^a&&b]]=], "(?:(?!(?:(?=[a])[b]))(?s:.))" },
      { [[\p{N}{1,3}]], [[\p{N}{1,3}]] },
      { [[a{1,3}+]], "(?:a{1,3})+" },
      { [[(ab){2}?]], "(?:(ab){2})?" },
      { [[x{,3}]], "x{0,3}" },
      { [[a{b]], [[a\{b]] },
      { [[(?m:.)]], "(?s:.)" },
      { [[\h\v\d]], [=[[0-9A-Fa-f]\x{b}\p{Nd}]=] },
      { [[\u2581\x{41}\x42]], [[\x{2581}\x{41}\x{42}]] },
      { [=[[]a]]=], [=[[\]a]]=] },
      { [=[[[:punct:]\-]]=], [=[[\p{P}\p{S}\-]]=] },
      { [=[[a[-z]]]=], [=[[a\-z]]=] },
    }
    for _, c in ipairs(cases) do assert.equal(c[2], regex.translate(c[1])) end
  end)

  it("refuses what it does not understand, and names it", function()
    for _, pattern in ipairs { "(*FAIL)", "[a", "a)", [[\y]], "(?~a)", "[[:foo:]]", "\255", "{2}", [=[[\q]]=], "\\" } do
      local translated, message = regex.translate(pattern)
      assert.is_nil(translated)
      assert.matches("not understood", message)
      assert.is_true(message:find(pattern, 1, true) ~= nil)
    end
  end)

  it("survives any bytes", function()
    math.randomseed(1)
    local alphabet, refused = [=[\[]^-&(){}?*+|.sSpdwx{L}:!<=n1a,é日]=], 0
    for _ = 1, 5000 do
      local s = {}
      for i = 1, math.random(12) do
        local k = math.random(#alphabet)
        s[i] = alphabet:sub(k, k)
      end
      local translated, message = regex.translate(table.concat(s))
      if not translated then
        refused = refused + 1
        assert.is_string(message)
        assert.is_nil(message:find("could not be read", 1, true), message)
      end
    end
    assert.is_true(refused > 100)
  end)

  it("cuts as Oniguruma does", function()
    assert.same({ "ab²", " ", "é日" }, pieces([[\w+]], "ab² é日"))
    assert.same({ "a", " × ", "²" }, pieces([[\w]], "a × ²"))
    assert.same({ "a", "b", "c" }, pieces("x*", "abc"))
    assert.same({ "a ", "b ", "c" }, pieces(" ", "a b c", "MergedWithPrevious"))
    assert.same({ "a", " b", " c" }, pieces(" ", "a b c", "MergedWithNext"))
    assert.same({ "a", "b" }, pieces(" ", "a b", "Removed"))
    assert.same({ "a", "  ", "b" }, pieces(" ", "a  b", "Contiguous"))
    assert.same({ "ab", "cd" }, pieces([[\p{L}+]], "ab cd", "Removed", true))
    assert.same({ "I", "'S", "x" }, pieces("(?i:'s|'t)", "I'Sx"))
    assert.same({ "I", "'ſ" }, pieces("(?i:'s|'t)", "I'ſ"))
    assert.same({ "a", "\n", "b" }, pieces("^.$", "a\nb"))
  end)

  it("stops a pattern that would run forever", function()
    local folder, gone = support.folder()
    local vocab = { a = 0, b = 1 }
    support.write(folder .. "/tokenizer.json", cjson.encode {
      model = { type = "BPE", vocab = vocab, merges = {} },
      pre_tokenizer = { type = "Split", pattern = { Regex = "(a+a+)+$" }, behavior = "Isolated", invert = false },
    })
    local tok = assert(tokenizer.load(folder))
    gone()
    assert.error_matches(function() tok:encode(("a"):rep(4000) .. "b") end, "pattern could not be run")
    assert.same({ 0, 0 }, tok:encode "aa")
  end)

  it("matches a run longer than JIT's stack", function()
    local folder, gone = support.folder()
    support.write(folder .. "/tokenizer.json", cjson.encode {
      model = { type = "BPE", vocab = { a = 0, b = 1 }, merges = {} },
      pre_tokenizer = { type = "Split", pattern = { Regex = "(?:a|b)+" }, behavior = "Isolated", invert = false },
    })
    local tok = assert(tokenizer.load(folder))
    gone()
    assert.equal(100000, #tok:encode(("ab"):rep(50000)))
  end)
end)
