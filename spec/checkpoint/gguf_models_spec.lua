-- A tiny GGUF file of every architecture, written by llama.cpp's converter (spec/fixtures/make/checkpoint_gguf.py), against the model it was
-- made from: the same names, shapes and values, and transformers' logits.
local checkpoint = require "wane.checkpoint"
local files = require "support.files"
local loader = require "wane.loader"
local safetensors = require "spec.support.safetensors"
local wane = require "wane"

local fixtures = "spec/fixtures/"
local TOLERANCE = 2e-4
local worst = {}

local function lists(tensor)
  local rows, n = {}, tensor.shape[2]
  for b = 1, tensor.shape[1] do
    rows[b] = {}
    for t = 1, n do rows[b][t] = tonumber(tensor.data[(b - 1) * n + t - 1]) end
  end
  return rows
end

-- Largest difference of two tensors as f32; NaN counts as worst.
local function difference(tensor, expected)
  local F = require "wane.nn.functional"
  local values, n = F.read(tensor, "float")
  assert.equal(expected.numel, n)
  local most = 0
  for i = 0, n - 1 do
    local d = math.abs(values[i] - expected.data[i])
    if not (d <= most) then most = d end
  end
  return most
end

-- `exact = false`: the file holds 1 + weight, rounded.
local function check(name, exact)
  describe("GGUF of " .. name, function()
    local path, folder = fixtures .. "gguf/" .. name .. "-f16.gguf", fixtures .. "models/" .. name

    it("has the names and the values of the folder's tensors", function()
      local g, s = assert(checkpoint.open(path)), assert(checkpoint.open(folder))
      local a, b = g:names(), s:names()
      table.sort(a)
      table.sort(b)
      assert.same(b, a)
      assert.same({ missing = {}, unexpected = {} }, g:report(b))
      local want, have = {}, {}
      for i, n in ipairs(b) do want[i], have[i] = { entry = s:find(n), dtype = "f32" }, { entry = g:find(n), dtype = "f32" } end
      want, have = assert(loader.load(s, want)), assert(loader.load(g, have))
      for i, n in ipairs(b) do
        assert.same(want[i]:shape(), have[i]:shape(), n)
        if exact or #want[i]:shape() > 1 then
          assert.is_true(files.bytes(want[i]) == files.bytes(have[i]), n)
        else
          assert.is_true((want[i] - have[i]):abs():max():item() <= 6e-8, n)
        end
      end
    end)

    it("gives transformers' logits", function()
      local expected = safetensors.read(folder .. "/expected.safetensors")
      local model = assert(wane.load(path, { tokenizer = false, compute = "f32" }))
      local options = expected.decoder_input_ids and { decoder_input_ids = lists(expected.decoder_input_ids) }
      local d = difference(model:forward(lists(expected.input_ids), options), expected.logits)
      worst[#worst + 1] = ("%s %.1e"):format(name, d)
      assert.is_true(d <= TOLERANCE, ("the logits differ by %g"):format(d))
      model:close()
    end)
  end)
end

teardown(function() print("    largest difference of logits: " .. table.concat(worst, ", ")) end)

for _, name in ipairs {
  "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi", "phi3", "phi3_long", "falcon", "bloom", "gptj", "gpt_neox", "gpt2", "t5", "flan_t5",
} do check(name, true) end
check("gemma2", false)
check("gemma3", false)
