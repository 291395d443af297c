-- Falcon against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"
golden.check("falcon", { layer = "transformer.h.%d" })
describe("Falcon, the other architectures", function()
  golden.variant "falcon_40b"
  golden.variant "falcon_11b"
  golden.variant "falcon_rw"
  golden.variant "falcon_heads"
end)
