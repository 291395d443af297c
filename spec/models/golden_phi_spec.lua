-- Phi against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"
golden.check("phi", { layer = "model.layers.%d" })
describe("Phi with norms on queries and keys", function()
  golden.variant "phi_qk"
end)
