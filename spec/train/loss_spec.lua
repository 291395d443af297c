-- model:loss: ids and labels that do not belong together are refused, by their shapes.
local golden = require "spec.support.golden"
local wane = require "wane"

local three, two = { { 5, 6, 7 }, { 8, 9, 10 } }, { { 5, 6 }, { 7, 8 }, { 9, 10 } }       -- [2, 3] and [3, 2]: six labels each

describe("the loss of ids and labels", function()
  it("of different shapes is refused, whether ids are lists or a Tensor", function()
    local model = assert(wane.load(golden.root .. "llama", { tokenizer = false }))
    local function refuses(ids, labels, message)
      local ok, found = pcall(model.loss, model, ids, labels)
      assert.is_false(ok)
      assert.is_truthy(tostring(found):find(message, 1, true), tostring(found))
    end
    local tensor = wane.tensor(three, "i32")
    refuses(three, two, "loss: ids are [2, 3], labels are [3, 2]: expected a label for each id (-100: not scored)")
    refuses(tensor, two, "loss: ids are [2, 3], labels are [3, 2]: expected a label for each id")
    refuses(two, three, "loss: ids are [3, 2], labels are [2, 3]")
    refuses(three, { { 5, 6 }, { 8, 9 } }, "loss: ids are [2, 3], labels are [2, 2]")
    refuses(three, { { 5, 6, 7 }, { 8, 9 } }, "loss: ids are [2, 3], labels are [2, 2 to 3]")
    refuses(three, { 5, 6, 7 }, "loss: ids are [2, 3], labels are [1, 3]")
    refuses({ 5, 6, 7 }, three, "loss: ids are [1, 3], labels are [2, 3]")
    refuses(three, {}, "loss: ids are [2, 3], labels are [0]")
    refuses(three, tensor, "loss: labels: expected lists of ids, found a Tensor (its totable() makes lists)")
    assert.equal(model:loss(three, three):item(), model:loss(tensor, three):item())
    assert.is_number(model:loss({ 5, 6, 7 }, { { 5, 6, 7 } }):item())
    model:close()
  end)

  it("of an encoder-decoder takes labels of another length, not another number of rows", function()
    local model = assert(wane.load(golden.root .. "t5", { tokenizer = false }))
    assert.is_number(model:loss(three, { { 5, 6 }, { 7, 8 } }):item())
    assert.error_matches(function() model:loss(three, two) end, "loss: ids are %[2, 3%], labels are %[3, 2%]: expected as many rows")
    model:close()
  end)
end)
