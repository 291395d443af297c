--- The REPL's parts that need no terminal: completion, printing, documentation, history.
package.preload["wane.repl.docstrings"] = package.preload["wane.repl.docstrings"] or function() return dofile "repl/docstrings.lua" end
local complete = dofile "repl/complete.lua"
local show = dofile "repl/show.lua"
local docstrings = require "wane.repl.docstrings"
local help = dofile "repl/help.lua"
local history = dofile "repl/history.lua"

local function names(env, text)
  local items, start = complete.complete(env, text, #text + 1)
  local list = {}
  for i, item in ipairs(items) do list[i] = item.text end
  return list, start
end

describe("completion", function()
  local class = { narrow = function() end, size = 3, _hidden = 1 }
  class.__index = class
  local env = { model = { layers = { [1] = { mlp = setmetatable({ up = 1 }, class) } } }, mode = 1, s = "text" }

  it("completes names and keywords", function()
    assert.same({ "mode", "model" }, (names(env, "print(mo")))
    assert.same({ "while" }, (names(env, "whi")))
  end)

  it("walks fields, indices and __index", function()
    assert.same({ "layers" }, (names(env, "model.")))
    local list, start = names(env, "x = model.layers[1].mlp.n")
    assert.same({ "narrow" }, list)
    assert.equal(#"x = model.layers[1].mlp." + 1, start)
    assert.same({ "narrow", "size", "up" }, (names(env, "model.layers[1].mlp.")))
    assert.same({ "_hidden" }, (names(env, "model.layers[1].mlp._h")))
  end)

  it("offers only functions behind a colon, and strings' own", function()
    assert.same({ "narrow" }, (names(env, "model.layers[1].mlp:")))
    assert.same({ "rep", "reverse" }, (names(env, "s:re")))
  end)

  it("survives names that do not exist and fields that raise", function()
    env.bad = setmetatable({}, { __index = function() error "no" end })
    assert.same({}, (names(env, "nothing.at.")))
    assert.same({}, (names(env, "bad.field.")))
  end)

  it("completes modules inside require and files inside other strings", function()
    assert.same({ "wane.cli" }, (names(env, "require 'wane.cl")))
    assert.same({ "repl/main.c", "repl/main.lua" }, (names(env, "wane.load('repl/mai")))
    assert.same({ "core/include/" }, (names(env, "f('core/inc")))
  end)
end)

describe("printing", function()
  it("prints tables compactly, to a depth, and once only", function()
    assert.equal("{ 1, 2, a = true }", show.show { 1, 2, a = true })
    assert.equal("{ { { {…} } } }", show.show { { { { 1 } } } })
    local t = {}
    t.self = t
    assert.equal("{ self = { the same again } }", show.show(t))
    assert.equal('{ [2.5] = "x", ["a b"] = 1 }', show.show { ["a b"] = 1, [2.5] = "x" })
  end)

  it("shortens long lists", function()
    local long = {}
    for i = 1, 1000 do long[i] = i end
    local text = show.show(long)
    assert.matches("… 976 more", text)
    assert.is_true(#text < 400)
  end)

  it("quotes strings and escapes what a terminal would obey", function()
    assert.equal([["a\nb\27[31m\"q\""]], show.show 'a\nb\27[31m"q"')
  end)

  it("uses __tostring, and its first line only inside another table", function()
    local object = setmetatable({}, { __tostring = function() return "Tensor [2, 3]\n1 2 3" end })
    assert.equal("Tensor [2, 3]\n1 2 3", show.show(object))
    assert.equal("{ Tensor [2, 3] … }", show.show { object })
  end)

  it("survives a __tostring that raises", function()
    assert.matches("<.*broken>", show.show(setmetatable({}, { __tostring = function() error "broken" end })))
  end)
end)

describe("documentation", function()
  local path = os.tmpname()
  local file = assert(io.open(path, "w"))
  file:write [[
--- A module that does things.
-- Two lines of it.
local M = {}

--- Adds numbers. Never fails.
-- Slowly.
-- @param a number the first
--   of the two
-- @param b number
-- @return number the sum
function M.add(a, b) return a + b end

function M.bare() end

--- A value.
M.limit = 3

local function private() end
M.other = private

return M
]]
  file:close()

  it("reads blocks, tags and undocumented functions out of Lua", function()
    local entries = docstrings.lua_file(path)
    assert.equal("A module that does things.\nTwo lines of it.", entries.header)
    assert.equal("M.add", entries[1].name)
    assert.equal("(a, b)", entries[1].parameters)
    assert.equal("Adds numbers. Never fails.\nSlowly.", entries[1].text)
    assert.same({ { name = "a", what = "number the first of the two" }, { name = "b", what = "number" } }, entries[1].params)
    assert.equal("number the sum", entries[1].returns[1].what)
    assert.equal("M.bare", entries[2].name)
    assert.is_false(entries[2].documented)
    assert.equal("M.limit", entries[3].name)
    assert.is_nil(entries[4])
    assert.equal("Adds numbers.", docstrings.summary(entries[1].text))
  end)

  it("reads comments above and behind the functions of a header", function()
    local found = {}
    for _, entry in ipairs(docstrings.c_header "core/include/wane.h") do found[entry.name] = entry end
    assert.matches("^ABI number of the library", found.wane_abi.text)
    assert.matches("frees its tensors", found.wane_scope_close.text)
    assert.matches("const wane_attention_options %*options%);$", found.wane_attention.declaration)
    assert.is_true(found.wane_view_select.documented)
  end)

  it("finds a function's text through its value, its name and its module", function()
    local module = dofile(path)
    assert.matches("^m%.add%(a, b%)\nAdds numbers", help.lookup(".", "m.add", module.add))
    assert.matches("no documentation", help.lookup(".", "m.bare", module.bare))
    assert.matches("add%s+Adds numbers%.", help.lookup(".", "m", module))
    assert.matches("ABI number", help.lookup(".", "wane_abi", nil))
    assert.matches("Ctrl%-R", help.lookup(".", "", nil))
    assert.matches("nothing is known of 'xyzzy'", help.lookup(".", "xyzzy", nil))
    local wane = require "wane"                                    -- whose methods have others standing in their place
    assert.matches("^wane%.Tensor%.sum%(dim, keepdim%)\nSum", help.lookup(".", "wane.Tensor.sum", wane.Tensor.sum))
  end)
  teardown(function() os.remove(path) end)
end)

describe("history", function()
  it("keeps entries over sessions, newlines and backslashes too", function()
    local folder = os.tmpname()
    os.remove(folder)
    local path = folder .. "/deep/history"
    local first = history.open(path)
    first:add "x = 1"
    first:add "x = 1"
    first:add "for i = 1, 2 do\n  print '\\n'\nend"
    first:add " secret"
    local second = history.open(path)
    assert.same({ "x = 1", "for i = 1, 2 do\n  print '\\n'\nend" }, second.entries)
    os.remove(path)
    os.remove(folder .. "/deep")
    os.remove(folder)
  end)

  it("works without a file", function()
    local h = history.open "/proc/nowhere/history"
    h:add "a"
    assert.same({ "a" }, h.entries)
  end)
end)
