--- The line editor: keys come decoded from wane.terminal, a frame is drawn whole after each of them.
--
-- DESIGN. The text is one string, newlines included, so that a function over several lines is edited as one piece. `layout` cuts
-- it into screen rows by display width; `draw` goes back to the frame's first row, erases downwards and writes the rows anew: no
-- incremental updates, nothing to get out of step. Rows are one column narrower than the screen, so that the terminal never wraps
-- by itself. A frame taller than the screen is scrolled around the cursor.
local M = {}
local Editor = {}
Editor.__index = Editor

local MENU_ROWS = 6

--- A line editor.
-- @param terminal table wane.terminal, or a stand-in with key, write, size, cluster, raw, suspend
-- @param options table prompt, continuation (strings); history (wane.repl.history); complete(text, cursor) -> candidates, start;
--   finished(text) -> boolean, false where Enter shall begin another line; idle() called while no key is pressed, its milliseconds
-- @return table
function M.new(terminal, options)
  return setmetatable({
    terminal = terminal, prompt = options.prompt or "> ", continuation = options.continuation or ">> ", history = options.history,
    complete = options.complete, finished = options.finished, idle = options.idle, killed = "",
    text = "", cursor = 1, drawn = 0,              -- drawn: row of the screen's cursor within the frame, 0-based
  }, Editor)
end

-- ---------------------------------------------------------------- moving in the text

-- Position after the character at `pos`.
function Editor:after(pos)
  if pos > #self.text then return pos end
  return (self.terminal.cluster(self.text, pos))
end

-- Start of the line that holds `pos`.
function Editor:line_start(pos)
  while pos > 1 and self.text:byte(pos - 1) ~= 10 do pos = pos - 1 end
  return pos
end

-- End of the line that holds `pos`: the newline's position or one past the text.
function Editor:line_end(pos)
  return self.text:find("\n", pos, true) or #self.text + 1
end

-- Position of the character before `pos`.
function Editor:before(pos)
  if pos <= 1 then return 1 end
  if self.text:byte(pos - 1) == 10 then return pos - 1 end
  local at = self:line_start(pos)
  while true do
    local following = self:after(at)
    if following >= pos then return at end
    at = following
  end
end

function Editor:word_left(pos)
  while pos > 1 and not self.text:sub(pos - 1, pos - 1):find "[%w_\128-\255]" do pos = pos - 1 end
  while pos > 1 and self.text:sub(pos - 1, pos - 1):find "[%w_\128-\255]" do pos = pos - 1 end
  return pos
end

function Editor:word_right(pos)
  while pos <= #self.text and not self.text:sub(pos, pos):find "[%w_\128-\255]" do pos = pos + 1 end
  while pos <= #self.text and self.text:sub(pos, pos):find "[%w_\128-\255]" do pos = pos + 1 end
  return pos
end

-- ---------------------------------------------------------------- changing the text

function Editor:set(text, cursor)
  self.text, self.cursor = text, cursor or #text + 1
end

function Editor:insert(text)
  self:set(self.text:sub(1, self.cursor - 1) .. text .. self.text:sub(self.cursor), self.cursor + #text)
end

-- Removes [from, to) and returns it.
function Editor:remove(from, to)
  local gone = self.text:sub(from, to - 1)
  self:set(self.text:sub(1, from - 1) .. self.text:sub(to), from)
  return gone
end

function Editor:kill(from, to)
  if from < to then self.killed = self:remove(from, to) end
end

-- Pasted text loses what would move the cursor about.
local function printable(text)
  return (text:gsub("\r\n?", "\n"):gsub("\t", "  "):gsub("[%z\1-\9\11-\31\127]", ""))
end

-- ---------------------------------------------------------------- drawing

-- Columns that a text without newlines takes.
local function width_of(terminal, text)
  local width, at = 0, 1
  while at <= #text do
    local following, w = terminal.cluster(text, at)
    at, width = following, width + w
  end
  return width
end

-- Cuts the text into screen rows. Returns the rows (strings, prompts included) and the cursor's row and column, 0-based.
function Editor:layout(columns)
  local limit = math.max(columns - 1, 8)
  local rows, row, width = {}, self.prompt, width_of(self.terminal, self.prompt)
  local cursor_row, cursor_column
  local at = 1
  while true do
    if at == self.cursor then cursor_row, cursor_column = #rows, width end
    if at > #self.text then break end
    if self.text:byte(at) == 10 then
      rows[#rows + 1] = row
      row, width = self.continuation, width_of(self.terminal, self.continuation)
      at = at + 1
    else
      local following, w = self.terminal.cluster(self.text, at)
      if width + w > limit then
        rows[#rows + 1] = row
        row, width = "", 0
        if at == self.cursor then cursor_row, cursor_column = #rows, 0 end
      end
      row, width = row .. self.text:sub(at, following - 1), width + w
      at = following
    end
  end
  rows[#rows + 1] = row
  return rows, cursor_row, cursor_column
end

-- Rows of the completion menu: candidates in columns, the selected one inverted.
function Editor:menu_rows(columns)
  local menu, widest = self.menu, 0
  if not menu then return {} end
  for _, item in ipairs(menu.items) do widest = math.max(widest, width_of(self.terminal, item.label)) end
  local across = math.max(1, math.floor((columns - 1) / (widest + 2)))
  local count = math.ceil(#menu.items / across)
  local selected = math.floor((math.max(menu.selected, 1) - 1) / across)
  local first = math.max(0, math.min(selected - MENU_ROWS + 1, count - MENU_ROWS))
  local rows = {}
  for r = first, math.min(first + MENU_ROWS, count) - 1 do
    local cells = {}
    for i = r * across + 1, math.min((r + 1) * across, #menu.items) do
      local label = menu.items[i].label
      local pad = (" "):rep(widest - width_of(self.terminal, label))
      cells[#cells + 1] = (i == menu.selected and "\27[7m" .. label .. "\27[0m" or "\27[2m" .. label .. "\27[0m") .. pad
    end
    rows[#rows + 1] = table.concat(cells, "  ")
  end
  if count > first + MENU_ROWS then rows[#rows] = rows[#rows] .. ("\27[2m  … %d in all\27[0m"):format(#menu.items) end
  return rows
end

-- Draws the frame and leaves the screen's cursor where the text's cursor is.
function Editor:draw()
  local columns, height = self.terminal.size()
  local rows, row, column = self:layout(columns)
  local menu = self:menu_rows(columns)
  local visible = math.max(1, height - #menu)
  local top = 0
  if #rows > visible then top = math.max(0, math.min(row - math.floor(visible / 2), #rows - visible)) end
  local out = { self.drawn > 0 and ("\27[%dA"):format(self.drawn) or "", "\r\27[J" }
  local shown = math.min(#rows, top + visible)
  for i = top + 1, shown do
    out[#out + 1] = rows[i]
    if i < shown or #menu > 0 then out[#out + 1] = "\n" end
  end
  out[#out + 1] = table.concat(menu, "\n")
  local last = shown - top - 1 + #menu
  local up = last - (row - top)
  if up > 0 then out[#out + 1] = ("\27[%dA"):format(up) end
  out[#out + 1] = "\r"
  if column > 0 then out[#out + 1] = ("\27[%dC"):format(column) end
  self.terminal.write(table.concat(out))
  self.drawn = row - top
  self.on_screen = true
end

--- Takes the frame off the screen, so that other output can be written where it was.
function Editor:hide()
  if not self.on_screen then return end
  self.terminal.write((self.drawn > 0 and ("\27[%dA"):format(self.drawn) or "") .. "\r\27[J")
  self.drawn, self.on_screen = 0, false
end

--- Draws the frame again after hide().
function Editor:show()
  if self.reading then self:draw() end
end

-- Leaves the frame behind as it is and puts the screen's cursor on a fresh line below it.
function Editor:leave()
  self.menu = nil
  local cursor = self.cursor
  self.cursor = #self.text + 1
  self:draw()
  self.cursor = cursor
  self.terminal.write "\n"
  self.drawn, self.on_screen = 0, false
end

-- ---------------------------------------------------------------- history, search, completion

-- Moves up or down: a line inside the text, an entry of the history beyond its first or last line.
function Editor:vertical(step)
  local start = self:line_start(self.cursor)
  if step < 0 and start > 1 then
    local above = self:line_start(start - 1)
    self.cursor = math.min(above + self.cursor - start, start - 1)
  elseif step > 0 and self:line_end(self.cursor) <= #self.text then
    local below = self:line_end(self.cursor) + 1
    self.cursor = math.min(below + self.cursor - start, self:line_end(below))
  else
    self:recall(step)
  end
end

-- Shows an older (-1) or newer (1) entry; the line being written waits below the newest.
function Editor:recall(step)
  local history = self.history
  if not history then return end
  local at = self.entry + step
  if at < 1 or at > #history.entries + 1 then return end
  if self.entry == #history.entries + 1 then self.draft = self.text end
  self.entry = at
  self:set(history.entries[at] or self.draft or "")
end

-- ctrl-R: looks for older entries that contain what is typed. Returns a key that ended the search and is still to be obeyed.
function Editor:search()
  local history = self.history
  if not history then return end
  local prompt, text, cursor = self.prompt, self.text, self.cursor
  local query, found = "", #history.entries + 1
  local function look(from)
    for i = math.min(from, #history.entries), 1, -1 do
      local at = history.entries[i]:find(query, 1, true)
      if at then
        found = i
        self:set(history.entries[i], at)
        return true
      end
    end
  end
  local missing = false
  while true do
    self.prompt = ("(%s '%s') "):format(missing and "not found:" or "search", query)
    self:draw()
    local kind, value = self.terminal.key(-1)
    if kind == "text" or kind == "paste" then
      query = query .. printable(value):gsub("\n", " ")
      missing = not look(found)
    elseif kind == "key" and value == "ctrl-r" then
      missing = not look(found - 1)
    elseif kind == "key" and value == "backspace" then
      query = query:gsub("[%z\1-\127\192-\255][\128-\191]*$", "")
      missing = query ~= "" and not look(#history.entries)
    elseif kind == "key" or kind == "eof" then
      self.prompt = prompt
      if value == "ctrl-g" or value == "ctrl-c" or value == "escape" then
        self:set(text, cursor)
        return
      end
      return kind, value
    end
  end
end

-- Longest beginning that all candidates share.
local function common_prefix(items)
  local prefix = items[1].text
  for _, item in ipairs(items) do
    while item.text:sub(1, #prefix) ~= prefix do prefix = prefix:sub(1, -2) end
  end
  return prefix
end

-- Tab: indents at the start of a line, else completes; again: goes through the candidates.
function Editor:tab(step)
  if self.menu then
    local menu = self.menu
    menu.selected = (math.max(menu.selected, step < 0 and 1 or 0) + step - 1) % #menu.items + 1
    self:remove(menu.start, menu.start + menu.length)
    self:insert(menu.items[menu.selected].text)
    menu.length = #menu.items[menu.selected].text
    return
  end
  local before = self.text:sub(self:line_start(self.cursor), self.cursor - 1)
  if not before:find "%S" then return self:insert "  " end
  if not self.complete then return end
  local items, start = self.complete(self.text, self.cursor)
  if not items or #items == 0 then return end
  local prefix = common_prefix(items)
  local had = self.cursor - start
  if #prefix > had or #items == 1 then
    self:remove(start, self.cursor)
    self:insert(prefix)
  end
  if #items > 1 then self.menu = { items = items, selected = 0, start = start, length = self.cursor - start } end
end

-- ---------------------------------------------------------------- keys

local keys = {}

keys["ctrl-a"] = function(e) e.cursor = e:line_start(e.cursor) end
keys["ctrl-e"] = function(e) e.cursor = e:line_end(e.cursor) end
keys["ctrl-b"] = function(e) e.cursor = e:before(e.cursor) end
keys["ctrl-f"] = function(e) e.cursor = e:after(e.cursor) end
keys["alt-b"] = function(e) e.cursor = e:word_left(e.cursor) end
keys["alt-f"] = function(e) e.cursor = e:word_right(e.cursor) end
keys["ctrl-p"] = function(e) e:vertical(-1) end
keys["ctrl-n"] = function(e) e:vertical(1) end
keys["pageup"] = function(e) e:recall(-1) end
keys["pagedown"] = function(e) e:recall(1) end
keys["alt-<"] = function(e) e.cursor = 1 end
keys["alt->"] = function(e) e.cursor = #e.text + 1 end
keys["backspace"] = function(e) e:remove(e:before(e.cursor), e.cursor) end
keys["delete"] = function(e) e:remove(e.cursor, e:after(e.cursor)) end
keys["alt-backspace"] = function(e) e:kill(e:word_left(e.cursor), e.cursor) end
keys["alt-d"] = function(e) e:kill(e.cursor, e:word_right(e.cursor)) end
keys["ctrl-k"] = function(e) e:kill(e.cursor, math.max(e:line_end(e.cursor), math.min(e.cursor + 1, #e.text + 1))) end
keys["ctrl-u"] = function(e) e:kill(e:line_start(e.cursor), e.cursor) end
keys["ctrl-y"] = function(e) e:insert(e.killed) end
keys["ctrl-w"] = function(e)
  local from = e.cursor
  while from > 1 and e.text:sub(from - 1, from - 1):find "%s" do from = from - 1 end
  while from > 1 and e.text:sub(from - 1, from - 1):find "%S" do from = from - 1 end
  e:kill(from, e.cursor)
end
keys["ctrl-t"] = function(e)
  if e.cursor > #e.text then e.cursor = e:before(e.cursor) end
  local left = e:before(e.cursor)
  if left == e.cursor or e.text:find("^\n", left) then return end
  local right = e:after(e.cursor)
  local swapped = e.text:sub(e.cursor, right - 1) .. e.text:sub(left, e.cursor - 1)
  e:remove(left, right)
  e:insert(swapped)
end
keys["ctrl-l"] = function(e)
  e.terminal.write "\27[H\27[2J"
  e.drawn = 0
end
keys["ctrl-z"] = function(e)
  e:hide()
  e.terminal.suspend()
  e.terminal.raw(true)
end
keys["alt-enter"] = function(e) e:insert "\n" end
keys["tab"] = function(e) e:tab(1) end
keys["backtab"] = function(e) if e.menu then e:tab(-1) end end
for alias, key in pairs { home = "ctrl-a", ["end"] = "ctrl-e", left = "ctrl-b", right = "ctrl-f", up = "ctrl-p", down = "ctrl-n",
                          ["ctrl-h"] = "backspace", ["ctrl-j"] = "enter" } do
  keys[alias] = keys[key]
end

-- Obeys one key. Returns what read() shall return once the line is done.
function Editor:obey(kind, value)
  if kind == "text" then
    self:insert(value)
  elseif kind == "paste" then
    self:insert(printable(value))
  elseif kind == "eof" or (value == "ctrl-d" and self.text == "") then
    self:leave()
    return true, nil, "eof"
  elseif value == "ctrl-d" then
    keys["delete"](self)
  elseif value == "ctrl-c" then
    self:leave()
    return true, nil, "interrupt"
  elseif value == "enter" then
    -- In the middle of a text that is not finished, or where the text goes on, Enter is a new line.
    if self.finished and not self.finished(self.text) then
      self:insert "\n"
    else
      self:leave()
      return true, self.text
    end
  elseif keys[value] then
    keys[value](self)
  end
  return false
end

--- Reads one text, which may have several lines.
-- @return string|nil, string|nil the text; or nil and "eof" or "interrupt" (ctrl-C)
function Editor:read()
  self.terminal.raw(true)
  self.reading, self.menu, self.draft = true, nil, nil
  self.entry = self.history and #self.history.entries + 1 or 1
  self:set ""
  self:draw()
  while true do
    local kind, value = self.terminal.key(self.idle and self.idle() or -1)
    if kind == "key" and value == "ctrl-r" then
      self.menu = nil
      kind, value = self:search()
      self:draw()
    end
    if kind and kind ~= "timeout" then
      if value ~= "tab" and value ~= "backtab" then self.menu = nil end
      local done, text, why = self:obey(kind, value)
      if done then
        self.reading = false
        self.terminal.raw(false)
        return text, why
      end
      self:draw()
    end
  end
end

return M
