-- Phi against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"
golden.check("phi", { layer = "model.layers.%d" })
