-- Which modules adapters change: Python's patterns, PEFT's rules.
local models = require "wane.models"
local pattern = require "wane.lora.pattern"
local targets = require "wane.lora.targets"
local golden = require "spec.support.golden"

local function tree(name) return assert(models.build(golden.read_json("spec/fixtures/train/base/" .. name .. "/config.json"))) end

local function paths(found)
  local list = {}
  for i, t in ipairs(found) do list[i] = t.path end
  return list
end

describe("patterns", function()
  it("match the whole of a text, as re.fullmatch does", function()
    for _, case in ipairs {
      { ".*\\.(q_proj|v_proj)", "a.q_proj", true }, { "q_proj", "a.q_proj", false }, { ".*q_proj", "a.q_proj.b", false }, { "(?i)Q_PROJ", "q_proj", true },
      { "a|ab", "ab", true }, { "layers\\.\\d+\\.[^.]*", "layers.12.mlp", true }, { "layers\\.\\d+\\Z", "layers.12", true }, { "^a$", "a", true },
      { "[]a]+", "]a", true }, { "[^]]+", "a", true }, { "[[:alpha:]]", "[]", true }, { "(?P<x>a)(?P=x)", "aa", true }, { "\\u0061", "a", true },
      { "(a)\\1", "aa", true }, { "x{2,3}", "xxx", true }, { "(?!b).", "b", false }, { "", "", true },
    } do
      assert.equal(case[3], assert(pattern.compile(case[1])):matches(case[2]), case[1])
    end
  end)

  it("that Python does not know are refused with their place", function()
    for text, part in pairs { ["a(b"] = "parenthes", ["a)(b"] = "parenthes", ["*a"] = "quantifier", ["\\Qa\\E"] = "\\Q at byte 1", ["(?R)"] = "(?R at byte 1",
                              ["a(*FAIL)"] = "(*F at byte 2", ["a\\K"] = "\\K at byte 2", ["[a"] = "missing terminating ]", ["\\"] = "at byte 1",
                              ["(?1)"] = "(?1", ["(?|a)"] = "(?|" } do
      local p, message = pattern.compile(text)
      assert.is_nil(p, text)
      assert.is_truthy(message:find(part, 1, true), text .. ": " .. message)
      assert.is_truthy(message:find("pattern '" .. text, 1, true), message)
    end
  end)

  it("that would run for ages are an error", function()
    local nothing, message, code = pattern.guard(function() return assert(pattern.compile "(?:a|a)*[^a]"):matches(("a"):rep(5000)) end)
    assert.is_nil(nothing)
    assert.is_truthy(message:find("(?:a|a)*[^a]", 1, true), message)
    assert.equal("WANE_E_FORMAT", code)
  end)
end)

describe("targets", function()
  it("of a list name a path's end or the whole path", function()
    local found, unused = assert(targets.match(tree "llama", { target_modules = { "q_proj", "model.layers.1.mlp.up_proj", "proj", "w1" } }))
    assert.same({ "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj" }, paths(found))
    table.sort(unused)
    assert.same({ "proj", "w1" }, unused)
  end)

  it("all-linear is every Linear but the head", function()
    local found = assert(targets.match(tree "llama", { target_modules = "all-linear" }))
    assert.equal(14, #found)
    assert.equal(14, #assert(targets.match(tree "llama", { target_modules = "ALL-LINEAR" })))
  end)

  it("heed exclude_modules and modules_to_save", function()
    local found = assert(targets.match(tree "llama", { target_modules = "all-linear", exclude_modules = { "mlp.up_proj", "self_attn.q_proj" } }))
    assert.equal(10, #found)
    found = assert(targets.match(tree "llama", { target_modules = "all-linear", exclude_modules = ".*\\.0\\..*", modules_to_save = { "mlp" } }))
    assert.same({ "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj",
      "model.layers.1.self_attn.o_proj" }, paths(found))
  end)

  it("heed layers_to_transform and layers_pattern", function()
    local o = { target_modules = { "q_proj", "v_proj" }, layers_to_transform = 1 }
    local want = { "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj" }
    assert.same(want, paths(assert(targets.match(tree "llama", o))))
    o.layers_to_transform, o.layers_pattern = { 1, 7 }, "lay.rs"
    assert.same(want, paths(assert(targets.match(tree "llama", o))))
    o.layers_pattern = { "blocks" }
    local found, message = targets.match(tree "llama", o)
    assert.is_nil(found)
    assert.matches("once layers_to_transform", message)
  end)

  it("know GPT-NeoX's head under both names", function()
    for _, name in ipairs { "lm_head", "embed_out" } do
      local found = assert(targets.match(tree "gpt_neox", { target_modules = { name } }))
      assert.same({ "embed_out" }, paths(found))
      assert.equal(name, found[1].spelled)
    end
  end)

  it("know no module by another's name: T5 files may call the embedding lm_head, the model has one of its own", function()
    local t5 = assert(models.build(golden.read_json "spec/fixtures/models/flan_t5/config.json"))
    assert.same({ "lm_head" }, paths(assert(targets.match(t5, { target_modules = { "lm_head" } }))))
    assert.same({ "shared", "encoder.embed_tokens", "decoder.embed_tokens" }, targets.spellings(t5, "shared"))
  end)

  it("that are none are an error, never every Linear", function()
    for _, none in ipairs { {}, "", false } do
      local found, message, code = targets.match(tree "llama", { target_modules = none or nil })
      assert.is_nil(found)
      assert.matches("^target_modules names nothing: expected a list of names", message)
      assert.equal("WANE_E_ARG", code)
    end
  end)

  it("that name nothing, or what takes no adapter, are an error", function()
    local found, message, code = targets.match(tree "llama", { target_modules = { "w1", "w2" } })
    assert.is_nil(found)
    assert.equal("target_modules: nothing in this llama model is called w1, w2; print(model) draws the tree", message)
    assert.equal("WANE_E_ARG", code)
    found, message = targets.match(tree "llama", { target_modules = { "input_layernorm" } })
    assert.is_nil(found)
    assert.matches("'model.layers.0.input_layernorm' is a RMSNorm", message)
    found, message = targets.match(tree "llama", { target_modules = "(q_proj" })
    assert.is_nil(found)
    assert.matches("^target_modules: pattern", message)
  end)

  it("rank and alpha patterns: the first key, in alphabetical order, that is the whole path or its end", function()
    local of = assert(targets.patterns { ["q_proj"] = 3, [".*\\.q_proj"] = 5, ["layers\\.1\\..*"] = 7, ["^v_proj"] = 9 })
    assert.equal(5, of("a.q_proj", "a.q_proj"))
    assert.equal(3, of("q_proj", "q_proj"))
    assert.equal(7, of("model.layers.1.mlp.up", "model.layers.1.mlp.up"))
    assert.equal(9, of("v_proj", "v_proj"))
    assert.is_nil(of("a.v_proj", "a.v_proj"))
    local nothing, message = targets.patterns { ["("] = 1 }
    assert.is_nil(nothing)
    assert.matches("pattern", message)
  end)
end)
