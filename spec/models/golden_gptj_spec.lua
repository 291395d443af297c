-- GPT-J against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"
golden.check("gptj", { layer = "transformer.h.%d" })
