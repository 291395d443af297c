-- The real model, where it has been fetched (scripts/fetch-model): peak memory of loading it as NF4, in a process of its own.
local function model_path()
  local path = os.getenv "WANE_DEMO_MODEL" or (os.getenv "WANE_CACHE" or ".cache") .. "/models/SmolLM2-135M-Instruct.Q4_1.gguf"
  local f = io.open(path, "rb")
  if f then f:close() end
  return f and path:find "%.gguf$" and path
end

local script = [[
  local checkpoint, loader, core = require "wane.checkpoint", require "wane.loader", require "wane.core"
  local c = assert(checkpoint.open(arg[1]))
  local requests, kept = {}, 0
  for i, name in ipairs(c:names()) do
    local e = c:find(name)
    requests[i] = { entry = e, scheme = name:find "_proj" and { type = "nf4", double_quant = true } or nil, dtype = #e.shape == 1 and "f32" or nil }
  end
  local info, held = core.info_type(), 0
  for _, t in ipairs(assert(loader.load(c, requests))) do
    core.check(core.C.wane_tensor_info(t.h, info))
    held = held + tonumber(info.nbytes)
  end
  print(held, require("wane").memory().rss_peak)
]]

describe("the real model", function()
  local path = model_path()
  if not path then
    pending "not fetched: scripts/fetch-model"
    return
  end
  local file = os.tmpname()
  local f = assert(io.open(file, "w"))
  f:write(script)
  f:close()
  local pipe = assert(io.popen(("LUA_PATH='lua/?.lua;lua/?/init.lua' ${WANE_TEST_LUA:-luajit} %s '%s'"):format(file, path)))
  local held, peak = pipe:read("*n", "*n")
  pipe:close()
  os.remove(file)
  it(("loaded as NF4 holds %.1f MB and peaks at %.1f MB"):format((held or 0) / 1e6, (peak or 0) / 1e6), function()
    assert.is_true(peak > 0 and held > 0)
    if not os.getenv "WANE_SANITIZER" then assert.is_true(peak < held + 64 * 1024 * 1024) end
  end)
end)
