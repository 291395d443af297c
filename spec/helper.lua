--- Runs before all specs (see .busted).
-- The library is loaded here, once: busted may execute a spec file's requires again, and cdefs are permanent. After every test the
-- collector runs, so that a finalizer that crashes does so in the test that made its object.
local busted = require "busted"

local found, problem = pcall(require, "wane.core")
if not found then io.stderr:write("spec/helper.lua: ", tostring(problem), "\n") end

busted.subscribe({ "test", "end" }, function()
  collectgarbage()
  collectgarbage()
  return nil, true
end)
