-- Files as they are published: without the base model's prefix, with buffers that no model needs, with the tied head written out.
-- Each must give the logits of the plain folder, bit for bit, and quantize to the same codes.
local ffi = require "ffi"
local checkpoint = require "wane.checkpoint"
local F = require "wane.nn.functional"
local wane = require "wane"
local files = require "support.files"

local ids = { { 5, 17, 100, 42, 7 }, { 9, 8, 33, 150, 11 } }

local function logits(folder, quant)
  local model = assert(wane.load(folder, { tokenizer = false, compute = "f32", quant = quant }))
  local values, n = F.read(model:forward(ids), "float")
  model:close()
  return ffi.string(values, n * 4)
end

-- A fixture's folder with its tensors renamed and others added.
local function respelt(name, rename, extra)
  local source, folder = "spec/fixtures/models/" .. name, files.folder()
  local tensors, renamed = assert(checkpoint.read_safetensors(source .. "/model.safetensors")), {}
  for key, t in pairs(tensors) do renamed[rename(key)] = t end
  for key, t in pairs(extra(tensors)) do renamed[key] = t end
  assert(checkpoint.write_safetensors(folder .. "/model.safetensors", renamed, { format = "pt" }))
  files.write(folder .. "/config.json", files.read(source .. "/config.json"))
  return folder, source
end

local function without(prefix)
  return function(key) return key:sub(1, #prefix) == prefix and key:sub(#prefix + 1) or key end
end
local function nothing() return {} end
local function mask(key) return { [key] = files.tensor("u8", { 1, 1, 2, 2 }, "\1\0\1\1"), ["h.1.attn.masked_bias"] = files.tensor("f32", {}, "1234") } end

describe("published spellings", function()
  teardown(files.clean)
  for _, case in ipairs {
    { "bloom", "without transformer.", without "transformer.", nothing },
    { "opt", "decoder. only", without "model.", nothing },
    { "opt_350", "no prefix at all", without "model.decoder.", nothing },
    { "opt", "with lm_head", without "", function(t) return { ["lm_head.weight"] = t["model.decoder.embed_tokens.weight"] } end },
    { "gpt2", "without transformer., with causal masks", without "transformer.", function() return mask "h.0.attn.bias" end },
    { "gpt_neo", "with causal masks", without "", function() return mask "transformer.h.0.attn.attention.bias" end },
    { "gptj", "with causal masks", without "", function() return mask "transformer.h.0.attn.bias" end },
    { "falcon", "without transformer.", without "transformer.", nothing },
    { "phi", "from inside DataParallel", function(key) return "module." .. key end, nothing },
  } do
    it(case[1] .. ", " .. case[2], function()
      local folder, source = respelt(case[1], case[3], case[4])
      assert.is_true(logits(folder) == logits(source))
      assert.is_true(logits(folder, "nf4") == logits(source, "nf4"))
      local wanted = {}
      for _, name in ipairs(assert(checkpoint.open(source)):names()) do wanted[#wanted + 1] = name end
      local report = assert(checkpoint.open(folder)):report(wanted)
      assert.same({}, report.missing)
      assert.same(case[2] == "with lm_head" and { "lm_head.weight" } or {}, report.unexpected)
    end)
  end
end)

describe("skip lists", function()
  it("of your own override what stays unquantized by default: OPT's projections stay, GPT-J's head goes", function()
    local model = assert(wane.load("spec/fixtures/models/opt_350", { tokenizer = false, quant = { type = "nf4", skip = { "lm_head", "project_in" } } }))
    assert.equal("f16", model:find "model.decoder.project_in".weight:dtype())
    assert.equal("nf4", model:find "model.decoder.project_out".weight:dtype())
    model:close()
    for _, case in ipairs { { nil, "f16" }, { {}, "int8" } } do
      model = assert(wane.load("spec/fixtures/models/gptj", { tokenizer = false, quant = { type = "int8", skip = case[1] } }))
      assert.equal(case[2], model:find "lm_head".weight:dtype())
      model:close()
    end
  end)
end)

describe("configs", function()
  local models = require "wane.models"
  local function config(name) return assert(require("wane.checkpoint.json").read("spec/fixtures/models/" .. name .. "/config.json")) end

  it("of GPT-Neo that name another number of layers than they have are refused", function()
    local c = config "gpt_neo"
    c.num_layers = 3
    local tree, message, code = models.build(c)
    assert.is_nil(tree)
    assert.equal("WANE_E_FORMAT", code)
    assert.truthy(message:find("attention_types names 2 layers, num_layers is 3", 1, true))
  end)

  it("without a size under any of its names are refused", function()
    local c = config "gpt2"
    c.n_embd = nil
    local tree, message = models.build(c)
    assert.is_nil(tree)
    assert.truthy(message:find("'hidden_size' is missing", 1, true))
  end)
end)

describe("alibi", function()
  it("slopes of 8, 12 and 16 heads are the published ones", function()
    local slopes = require("wane.nn.alibi").slopes
    local function near(expected, n)
      local got = slopes(n)
      assert.equal(n, #got)
      for i, x in pairs(expected) do assert.is_true(math.abs(got[i] - x) < 1e-6, i) end
    end
    near({ 0.5, 0.25, [8] = 2 ^ -8 }, 8)
    near({ 0.5, 0.25, [8] = 2 ^ -8, [9] = 0.70710678, [10] = 0.35355339, [11] = 0.1767767, [12] = 0.08838835 }, 12)
    near({ 0.70710678, 0.5, 0.35355339, [16] = 0.00390625 }, 16)
    near({ 2 ^ -8, }, 1)
  end)
end)
