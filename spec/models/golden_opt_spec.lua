-- OPT against transformers, both norm orders; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"
golden.check("opt", { layer = "model.decoder.layers.%d" })
golden.check("opt_350", { layer = "model.decoder.layers.%d" })
describe("OPT without biases and norm weights", function()
  golden.variant "opt_plain"
end)
