--- Waiting inside OpenResty: the request's coroutine sleeps a little and looks again, because nginx polls no descriptors of others.
--
--     require("wane.host.openresty").here()
--     for piece in model:stream(tok, prompt) do ngx.print(piece) ngx.flush(true) end
-- @module wane.host.openresty
local core = require "wane.core"

local M = {}

--- The wait function for core.set_waiter: 1 ms, growing to 5.
function M.wait(_, over)
  local pause = 0.001
  while not over() do
    ngx.sleep(pause) -- luacheck: ignore
    pause = math.min(pause * 1.5, 0.005)
  end
end

--- Makes the running request wait without blocking the worker.
function M.here() core.set_waiter(M.wait) end

return M
