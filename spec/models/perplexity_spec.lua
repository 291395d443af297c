-- Perplexity by both conventions on a tiny model, against figures made with torch (spec/fixtures/make/train.py).
local cjson = require "cjson"
local wane = require "wane"
local safetensors = require "spec.support.safetensors"

local folder = "spec/fixtures/perplexity/"
local file = assert(io.open(folder .. "expected.json"))
local expected = cjson.decode(file:read "*a").results
file:close()

describe("perplexity", function()
  local model, ids
  setup(function()
    model = assert(wane.load(folder .. "model", { tokenizer = false }))
    ids = safetensors.list(safetensors.read(folder .. "tokens.safetensors").ids)
  end)
  teardown(function() model:close() end)

  local function close(got, want, what)
    assert.is_true(math.abs(got / want - 1) <= 1e-5, ("%s: %.8g, expected %.8g"):format(what, got, want))
  end

  it("hf convention: every stride, the exact mean and the docs' own figure", function()
    for _, e in ipairs(expected.hf) do
      local r = wane.evaluate.perplexity(model, ids, { convention = "hf", ctx = e.ctx, stride = e.stride })
      assert.equal(e.per_token.tokens, r.tokens)
      close(r.perplexity, e.per_token.perplexity, "per token, stride " .. e.stride)
      close(r.documentation, e.documentation.perplexity, "documentation, stride " .. e.stride)
    end
  end)

  it("llama.cpp's convention, with and without bos, and its standard error", function()
    for name, bos in pairs { llama_cpp_no_bos = false, llama_cpp_bos_0_prepended = 0 } do
      local e = expected[name]
      local text = bos and { bos, unpack(ids) } or ids  -- a tokenizer that adds bos adds it to the text as well
      local r = wane.evaluate.perplexity(model, text, { convention = "llama.cpp", ctx = e.ctx, bos = bos or nil })
      assert.equal(e.count, r.tokens)
      close(r.perplexity, e.perplexity, name)
      close(r.stderr, e.stderr, name .. " stderr")
    end
  end)

  it("refuses what makes no sense", function()
    assert.has_error(function() wane.evaluate.perplexity(model, ids, { convention = "mine" }) end)
    assert.has_error(function() wane.evaluate.perplexity(model, ids, { ctx = 32, stride = 40 }) end)
    assert.has_error(function() wane.evaluate.perplexity(model, { 1, 2, 3 }, { convention = "llama.cpp", ctx = 32 }) end)
  end)
end)
