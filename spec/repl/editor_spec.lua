--- The line editor, driven by made-up keys; the screen is what a small terminal emulation has drawn.
local editor = dofile "repl/editor.lua"

-- One character a cluster; 漢 is two columns wide, a combining accent belongs to the character before it.
local function cluster(s, i)
  local j = i + 1
  while s:byte(j) and s:byte(j) >= 0x80 and s:byte(j) < 0xc0 do j = j + 1 end
  local width = s:sub(i, j - 1) == "漢" and 2 or 1
  if s:sub(j, j + 1) == "\204\129" then j = j + 2 end
  return j, width
end

-- A terminal that plays a list of keys ({ "text", "abc" } or a key's name) and understands what the editor writes.
local function fake(keys, columns, rows)
  local t = { lines = { "" }, row = 1, column = 0 }
  function t.size() return columns or 40, rows or 24 end
  function t.raw(on) t.is_raw = on end
  t.cluster = cluster
  function t.key()
    local k = table.remove(keys, 1)
    if k == nil then return "eof" end
    if type(k) == "function" then
      k(t)
      return "timeout"
    end
    if type(k) == "table" then return k[1], k[2] end
    return "key", k
  end
  local function put(c)
    local line = t.lines[t.row]
    line = line .. (" "):rep(t.column - #line)
    t.lines[t.row] = line:sub(1, t.column) .. c .. line:sub(t.column + 2)
    t.column = t.column + 1
  end
  function t.write(s)
    local i = 1
    while i <= #s do
      local n, c = s:match("^\27%[(%d*)(%a)", i)
      if c then
        if c == "A" then t.row = t.row - tonumber(n)
        elseif c == "C" then t.column = t.column + tonumber(n)
        elseif c == "J" then
          t.lines[t.row] = t.lines[t.row]:sub(1, t.column)
          for r = t.row + 1, #t.lines do t.lines[r] = nil end
        end
        i = select(2, s:find("^\27%[%d*%a", i)) + 1
      else
        c = s:sub(i, i)
        if c == "\n" then
          t.row, t.column = t.row + 1, 0
          t.lines[t.row] = t.lines[t.row] or ""
        elseif c == "\r" then t.column = 0
        else put(c) end
        i = i + 1
      end
    end
  end
  return t
end

local function text(s) return { "text", s } end

-- Reads one text from keys; returns it, why it ended and the terminal.
local function read(keys, options)
  options = options or {}
  local terminal = fake(keys, options.columns, options.rows)
  local e = editor.new(terminal, options)
  local result, why = e:read()
  return result, why, terminal, e
end

describe("the line editor", function()
  it("returns what was typed", function()
    assert.equal("1 + 1", (read { text "1 + 1", "enter" }))
  end)

  it("leaves raw mode, and the line on the screen", function()
    local _, _, terminal = read { text "abc", "ctrl-a", "enter" }
    assert.is_false(terminal.is_raw)
    assert.same({ "> abc", "" }, terminal.lines)
  end)

  it("moves, deletes, kills, yanks and transposes", function()
    assert.equal("hello", (read { text "helo", "ctrl-b", text "l", "enter" }))
    assert.equal("bc", (read { text "abc", "home", "delete", "enter" }))
    assert.equal("ab", (read { text "abc", "backspace", "enter" }))
    assert.equal("world hello ", (read { text "hello world", "alt-b", "ctrl-u", "ctrl-e", text " ", "ctrl-y", "enter" }))
    assert.equal("one ", (read { text "one two.three", "ctrl-w", "enter" }))
    assert.equal("one two.", (read { text "one two.three", "alt-backspace", "enter" }))
    assert.equal("ba", (read { text "ab", "ctrl-t", "enter" }))
    assert.equal("xy", (read { text "xy zw", "alt-b", "left", "ctrl-k", "enter" }))
  end)

  it("treats a character with its accents as one", function()
    assert.equal("漢", (read { text "漢e\204\129", "backspace", "enter" }))
    assert.equal("xe\204\129", (read { text "e\204\129", "left", text "x", "enter" }))
  end)

  it("ctrl-C gives the line up, ctrl-D ends on an empty one and deletes on others", function()
    local result, why = read { text "abc", "ctrl-c" }
    assert.is_nil(result)
    assert.equal("interrupt", why)
    result, why = read { "ctrl-d" }
    assert.is_nil(result)
    assert.equal("eof", why)
    assert.equal("b", (read { text "ab", "home", "ctrl-d", "enter" }))
  end)

  it("goes on to another line while the text is not finished", function()
    local finished = function(s) return s:find "end$" ~= nil end
    assert.equal("do\nend", (read({ text "do", "enter", text "end", "enter" }, { finished = finished })))
    assert.equal("a\nb", (read { text "a", "alt-enter", text "b", "enter" }))
  end)

  it("keeps pasted newlines and drops pasted control characters", function()
    assert.equal("a\nb  c", (read { { "paste", "a\r\nb\tc\27\1" }, "enter" }))
  end)

  it("moves up and down inside a text of several lines", function()
    assert.equal("abX\nc", (read { { "paste", "ab\nc" }, "up", "end", text "X", "enter" }))
    assert.equal("ab\ncX", (read { { "paste", "ab\nc" }, "up", "down", "end", text "X", "enter" }))
  end)

  it("recalls history and keeps the line being written", function()
    local history = { entries = { "one", "two" } }
    assert.equal("one", (read({ "up", "up", "enter" }, { history = history })))
    assert.equal("two", (read({ "up", "up", "down", "enter" }, { history = history })))
    assert.equal("dra", (read({ text "dra", "up", "down", "enter" }, { history = history })))
    assert.equal("one", (read({ "up", "up", "up", "up", "enter" }, { history = history })))
  end)

  it("searches history backwards with ctrl-R", function()
    local history = { entries = { "print(1)", "x = 2", "print(3)" } }
    assert.equal("print(3)", (read({ "ctrl-r", text "print", "enter" }, { history = history })))
    assert.equal("print(1)", (read({ "ctrl-r", text "print", "ctrl-r", "enter" }, { history = history })))
    assert.equal("x = 2!", (read({ "ctrl-r", text "=", "end", text "!", "enter" }, { history = history })))
    assert.equal("abc", (read({ text "abc", "ctrl-r", text "print", "ctrl-g", "enter" }, { history = history })))
    assert.equal("print(3)", (read({ "ctrl-r", text "printz", "backspace", "enter" }, { history = history })))
  end)

  it("completes: one candidate, a common beginning, then each in turn", function()
    local function complete(s, cursor)
      local items = {}
      for _, name in ipairs { "narrow", "narrate", "ndim" } do
        if name:sub(1, cursor - 1) == s:sub(1, cursor - 1) then items[#items + 1] = { text = name, label = name } end
      end
      return items, 1
    end
    local options = { complete = complete }
    assert.equal("ndim", (read({ text "nd", "tab", "enter" }, options)))
    assert.equal("narr", (read({ text "na", "tab", "enter" }, options)))
    assert.equal("narrow", (read({ text "na", "tab", "tab", "enter" }, options)))
    assert.equal("narrate", (read({ text "na", "tab", "tab", "tab", "enter" }, options)))
    assert.equal("narrow", (read({ text "na", "tab", "tab", "tab", "tab", "enter" }, options)))
    assert.equal("narrate", (read({ text "na", "tab", "backtab", "enter" }, options)))
    assert.equal("  x", (read({ "tab", text "x", "enter" }, options)))
  end)

  it("cuts long lines below the screen's width and finds its way back", function()
    local long = ("abcdefghij"):rep(6)
    local cursor
    local _, _, terminal = read({ text(long), "home", function(t) cursor = { t.row, t.column } end, "enter" }, { columns = 21 })
    assert.same({ 1, 2 }, cursor)
    assert.same({ "> " .. long:sub(1, 18), long:sub(19, 38), long:sub(39, 58), long:sub(59), "" }, terminal.lines)
  end)

  it("scrolls a text that is taller than the screen", function()
    local at_cursor
    local keys = { { "paste", ("line\n"):rep(30) .. "last" }, function(t) at_cursor = #t.lines end, "enter" }
    read(keys, { rows = 10 })
    assert.equal(10, at_cursor)
  end)

  it("hides and shows itself around other output", function()
    local e
    local terminal = fake { text "abc", function(t)
      e:hide()
      t.write "tick\n"
      e:show()
    end, "enter" }
    e = editor.new(terminal, {})
    assert.equal("abc", e:read())
    assert.same({ "tick", "> abc", "" }, terminal.lines)
  end)

  it("calls idle and waits as long as that says", function()
    local calls = 0
    read({ text "a", "enter" }, { idle = function()
      calls = calls + 1
      return 20
    end })
    assert.equal(2, calls)
  end)
end)
