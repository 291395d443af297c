-- GPT-2 against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"
golden.check("gpt2", { layer = "transformer.h.%d" })
describe("GPT-2 with its own scales", function()
  golden.variant "gpt2_scales"
end)
