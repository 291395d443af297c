-- BLOOM against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"
golden.check("bloom", { layer = "transformer.h.%d" })
describe("BLOOM with residuals behind the norms", function()
  golden.variant "bloom_post"
end)
