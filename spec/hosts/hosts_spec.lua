-- Other people's event loops: a luv loop and headless Neovim go on while wane works. Gaps are printed, not asserted: they belong to the
-- machine as much as to wane. `luajit bench/host.lua MODEL` measures them properly.
local cjson = require "cjson"

local function has(program)
  return os.execute("command -v " .. program .. " >/dev/null 2>&1") == 0
end

local function model_path()
  local pipe = io.popen "ls .cache/models/*.gguf 2>/dev/null"
  local path = os.getenv "WANE_DEMO_MODEL" or pipe:read "*l"
  pipe:close()
  return path
end

describe("in a luv loop", function()
  it("a model loads and generates while a timer ticks; two generations at once do not mix", function()
    local uv = require "luv"
    local wane = require "wane"
    local host = require "wane.host.luv"
    local folder = "spec/fixtures/models/llama"
    local prompts = { { 20, 48, 52, 177, 149, 149, 91 }, { 9, 8, 7 }, { 100, 101 } }
    local quiet = assert(wane.load(folder, { tokenizer = false }))
    local want = {}
    for i, p in ipairs(prompts) do want[i] = quiet:generate({ p }, { max_new_tokens = 24, ignore_eos = true })[1] end
    local got, ticks, running, failures = {}, 0, #prompts, {}
    local timer = uv.new_timer()
    timer:start(1, 1, function() ticks = ticks + 1 end)
    for i, p in ipairs(prompts) do
      host.run(function()
        local model = assert(wane.load(folder, { tokenizer = false }))
        got[i] = model:generate({ p }, { max_new_tokens = 24, ignore_eos = true })[1]
        model:close()
      end, function(err)
        failures[#failures + 1] = err
        running = running - 1
        if running == 0 then timer:close() end
      end)
    end
    uv.run()
    assert.same({}, failures)
    assert.same(want, got)
    assert.is_true(ticks > 0)
    quiet:close()
  end)

  it("an error in a coroutine reaches its callback, not the process", function()
    local uv = require "luv"
    local wane = require "wane"
    local seen
    require("wane.host.luv").run(function() assert(wane.load "/nowhere/at/all") end, function(err) seen = err end)
    uv.run()
    assert.truthy(seen and seen:find("/nowhere/at/all", 1, true), tostring(seen))
  end)
end)

describe("in headless Neovim", function()
  it("a model loads and generates while the editor's loop goes on", function()
    if not has "nvim" then return pending "needs neovim" end
    if os.getenv "WANE_TEST_LUA" then return pending "not under a sanitizer: its run-time library is not in nvim" end
    local path = model_path() or "spec/fixtures/models/llama"
    local pipe = io.popen(("WANE_HOST_MODEL=%s timeout 120 nvim --headless -u NONE -c 'luafile spec/hosts/nvim.lua' 2>&1"):format(path))
    local text = pipe:read "*a"
    pipe:close()
    local line = text:match "{.-}"
    assert.truthy(line, text)
    local r = cjson.decode(line)
    assert.is_true(r.ticks > 3)
    assert.is_true(#r.result > 10)
    print(("  nvim: longest gap %.1f ms, 99th percentile %.1f ms, %d ticks"):format(r.longest_ms, r.p99_ms, r.ticks))
  end)
end)
