-- wane inspect: its output for people and for programs, and its exit statuses.
local cjson = require "cjson"
local checkpoint = require "wane.checkpoint"
local files = require "support.files"

local program = os.getenv "WANE_BIN" or "bin/wane"

-- Runs the command; returns its output (stderr too) and its status.
local function inspect(arguments)
  local pipe = assert(io.popen(("%s inspect %s 2>&1; echo status $?"):format(program, arguments)))
  local text = pipe:read "*a"
  pipe:close()
  local output, status = text:match "^(.*)status (%d+)\n$"
  return output, tonumber(status)
end

describe("wane inspect", function()
  local folder
  setup(function() folder = files.folder() end)
  teardown(files.clean)

  it("draws equal layers once", function()
    local text, status = inspect "spec/fixtures/models/gpt_neox_sharded"
    assert.equal(0, status)
    assert.truthy(text:find("6 files", 1, true))
    assert.truthy(text:find("gpt_neox.layers.(0-1).mlp.dense_h_to_4h.weight", 1, true))
    assert.is_nil(text:find("missing", 1, true))
  end)

  it("gives everything as JSON", function()
    local text, status = inspect "--json spec/fixtures/quant/checkpoints/llama/nf4-dq-bf16"
    assert.equal(0, status)
    local r = cjson.decode(text)
    assert.equal("llama", r.model_type)
    assert.equal("nf4, blocks of 64, double", r.quantization)
    assert.equal(21, #r.tensors)
    assert.same({ 0, 0, 0 }, { #r.missing, #r.unexpected, #r.invalid })
    assert.equal(144 * 72 * 2 + 72 * 5 + 2 * (72 * 72 * 2 + 24 * 72 * 2 + 3 * 72 * 104), r.parameters)
  end)

  it("reports what is missing, what is not used and what is not finite", function()
    local tensors = assert(checkpoint.read_safetensors "spec/fixtures/models/llama/model.safetensors")
    tensors["model.norm.weight"] = nil
    tensors.extra = files.tensor("f32", { 3 }, "\0\0\128\127\0\0\192\127\0\0\128\255")        -- inf, NaN, -inf
    assert(checkpoint.write_safetensors(folder .. "/model.safetensors", tensors, { format = "pt" }))
    files.write(folder .. "/config.json", files.read "spec/fixtures/models/llama/config.json")
    local text, status = inspect("--check --json " .. folder)
    assert.equal(0, status)
    local r = cjson.decode(text)
    assert.same({ "model.norm.weight" }, r.missing)
    assert.same({ "extra" }, r.unexpected)
    assert.same({ { name = "extra", nan = 1, inf = 2 } }, r.not_finite)
    text = inspect("--check " .. folder)
    assert.truthy(text:find("not finite: extra has 1 NaN and 2 infinite values", 1, true))
  end)

  it("fails with 1 for what is not there, and with 2 for what makes no sense", function()
    local text, status = inspect "/nowhere"
    assert.equal(1, status)
    assert.truthy(text:find("No such file", 1, true))
    text, status = inspect "--quant nf4 spec/fixtures/models/llama"
    assert.equal(2, status)
    assert.truthy(text:find("--plan", 1, true))
    assert.equal(2, (select(2, inspect "")))
  end)
end)
