-- GPT-Neo against transformers; what is compared is in spec/support/golden.lua.
local golden = require "spec.support.golden"
golden.check("gpt_neo", { layer = "transformer.h.%d" })
