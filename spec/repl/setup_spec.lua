--- The shell scripts a newcomer meets first: wrong usage is refused with status 2 and a line that says what there is.

local function status_of(command)
  local pipe = assert(io.popen("( " .. command .. " ) 2>&1; echo \"status $?\"", "r"))
  local out = pipe:read "*a"
  pipe:close()
  return tonumber(out:match "status (%d+)\n$"), out
end

describe("scripts", function()
  it("setup names its groups when asked for another", function()
    local status, out = status_of "scripts/setup nonsense"
    assert.equal(2, status)
    assert.matches("build, fetch, test, ci", out)
  end)

  it("setup is silent and quick where nothing is missing", function()
    local status, out = status_of "scripts/setup build"
    assert.equal(0, status)
    assert.equal("status 0\n", out)
  end)

  it("build names its configurations when asked for another", function()
    local status, out = status_of "scripts/build fast"
    assert.equal(2, status)
    assert.matches("release, debug, asan, tsan", out)
  end)

  it("fetch-model reports a missing WANE_DEMO_MODEL", function()
    local status, out = status_of "WANE_DEMO_MODEL=/nowhere/model.gguf scripts/fetch-model"
    assert.equal(1, status)
    assert.matches("/nowhere/model.gguf does not exist", out)
  end)

  it("fetch-model prints the path it was given", function()
    local status, out = status_of "WANE_DEMO_MODEL=premake5.lua scripts/fetch-model"
    assert.equal(0, status)
    assert.matches("^premake5.lua\n", out)
  end)
end)
