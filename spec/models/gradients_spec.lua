-- Gradients of every weight of every family, against torch's: d loss / d weight for labels = ids (spec/fixtures/models/*/expected.safetensors).
-- Tolerance of the fixtures' page: 1e-4 of the tensor's largest magnitude.
local F = require "wane.nn.functional"
local core = require "wane.core"
local golden = require "spec.support.golden"
local names = require "wane.checkpoint.names"
local safetensors = require "spec.support.safetensors"
local wane = require "wane"

local families = { "bloom", "gptj", "gpt_neox", "gpt_neox_seq", "opt", "opt_350", "gpt2", "gpt_neo", "t5", "flan_t5", "llama", "llama3", "mistral", "qwen2",
  "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe", "phi", "falcon", "phi3" }
local BAR = 1e-4

-- The gradient that the fixtures hold of a parameter, under any of its names; transposed where the file is.
local function expected_gradient(model, expected, path)
  for _, spelled in ipairs(names.spellings(model.family.name, path)) do
    if expected["grad." .. spelled] then return expected["grad." .. spelled] end
  end
end

local function is_transposed(model, path)
  for _, pattern in ipairs(model.family.transposed or {}) do if path:find(pattern) then return true end end
  return false
end

-- Largest difference, and the largest magnitude.
local function compare(got, want, transposed)
  local values, n = F.read(got, "float")
  assert.equal(want.numel, n)
  local worst, largest = 0, 0
  local rows, columns = got:shape()[1], got:shape()[2]
  for i = 0, n - 1 do
    local k = transposed and (i % columns) * rows + math.floor(i / columns) or i
    local d = math.abs(values[i] - want.data[k])
    if not (d <= worst) then worst = d end
    largest = math.max(largest, math.abs(want.data[k]))
  end
  return worst, largest
end

local function loss_of(model, expected)
  local ids = golden.lists(expected.input_ids)
  return model:loss(ids, expected.labels and golden.lists(expected.labels) or ids)
end

describe("gradients of every weight equal torch's:", function()
  for _, name in ipairs(families) do
    for _, checkpointing in ipairs { false, true } do
      it(name .. (checkpointing and ", checkpointed" or ""), function()
        local expected = safetensors.read(golden.root .. name .. "/expected.safetensors")
        local model = assert(wane.load(golden.root .. name, { tokenizer = false, compute = "f32" }))
        assert.is_true(model:train_parameters "." > 0)
        model:checkpoint_layers(checkpointing)
        local loss = loss_of(model, expected)
        local value = loss:item()
        assert.is_true(math.abs(value - expected.loss.data[0]) <= 1e-5, ("loss %g, expected %g"):format(value, expected.loss.data[0]))
        loss:backward()
        local worst, worst_path, count, seen = 0, "", 0, {}
        for path, tensor in model:parameters() do
          local want = expected_gradient(model, expected, path)
          if want and not seen[tensor] then
            seen[tensor] = true
            assert.is_truthy(tensor.grad, path .. " has no gradient")
            local d, largest = compare(tensor.grad, want, is_transposed(model, path))
            count = count + 1
            -- A key's bias changes nothing without rotary positions: its gradient is rounding noise (fixtures' page), of 1e-8.
            local share = d / math.max(largest, 1e-3)
            if share > worst then worst, worst_path = share, path end
            assert.is_true(share <= BAR, ("%s: differs by %g of %g"):format(path, d, largest))
          end
        end
        local wanted = 0
        for key in pairs(expected) do if key:find "^grad%." then wanted = wanted + 1 end end
        assert.is_true(count >= wanted - 2 and count > 0, ("%d of %d gradients compared"):format(count, wanted))
        print(("  %s%s: %d gradients, largest difference %.2g of the largest (%s)"):format(name, checkpointing and ", checkpointed" or "", count, worst,
          worst_path))
        model:close()
        core.check(core.wait())
      end)
    end
  end
end)
