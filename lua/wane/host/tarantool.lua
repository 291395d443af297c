--- Waiting inside Tarantool: the fiber yields until the descriptor is readable.
--
--     local fiber = require "fiber"
--     fiber.create(function() require("wane.host.tarantool").here() … end)
-- @module wane.host.tarantool
local core = require "wane.core"

local M = {}

--- The wait function for core.set_waiter.
function M.wait(fd, over)
  local iowait = require("socket").iowait
  while not over(true) do iowait(fd, "R") end
end

--- Makes the running fiber wait without blocking the others.
function M.here() core.set_waiter(M.wait) end

return M
