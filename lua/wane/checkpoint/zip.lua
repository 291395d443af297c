--- The table of contents of a zip archive whose entries are stored as they are: what torch.save writes.
--
-- Nothing is extracted: the caller gets places in the file. Whatever makes a place ambiguous is refused: compression, encryption, names
-- that occur twice, entries that overlap (a zip bomb's trick) or lie outside. Source: PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5.
-- @module wane.checkpoint.zip
local bit = require "bit"

local M = {}

local END, END64, LOCATOR64, CENTRAL, LOCAL = "PK\5\6", "PK\6\6", "PK\6\7", "PK\1\2", "PK\3\4"
local MOST_DIRECTORY = 64 * 2 ^ 20
local methods = { [1] = "shrunk", [6] = "imploded", [8] = "deflate", [9] = "deflate64", [12] = "bzip2", [14] = "lzma", [93] = "zstd", [95] = "xz" }

--- An unsigned little-endian number of `n` bytes at place `at` of a string (exact below 2^53).
-- @param s string
-- @param at integer from 1
-- @param n integer
-- @return number
function M.number(s, at, n)
  local value = 0
  for i = at + n - 1, at, -1 do value = value * 256 + s:byte(i) end
  return value
end

local number = M.number

-- ---------------------------------------------------------------- the end record

-- Where the directory lies: count, offset, bytes, and the place of the record that says so.
local function find_end(file)
  local tail_bytes = math.min(file.size, 22 + 65535)
  local base = file.size - tail_bytes
  local tail = file.read(base, tail_bytes)
  local at
  for i = #tail - 21, 1, -1 do                                     -- the comment behind the record may be anything, its length must fit
    if tail:sub(i, i + 3) == END and i + 21 + number(tail, i + 20, 2) == #tail then at = i break end
  end
  if not at then file.fail("has no end record of a zip archive: it is truncated or no torch file") end
  local e = { place = base + at - 1, disk = number(tail, at + 4, 2), start_disk = number(tail, at + 6, 2), here = number(tail, at + 8, 2),
              count = number(tail, at + 10, 2), bytes = number(tail, at + 12, 4), offset = number(tail, at + 16, 4) }
  if e.place < 20 then return e end
  local locator = file.read(e.place - 20, 20)
  if locator:sub(1, 4) ~= LOCATOR64 then return e end
  local place = number(locator, 9, 8)
  if place + 56 > e.place - 20 then file.fail("has a zip64 end record outside the file") end
  local r = file.read(place, 56)
  if r:sub(1, 4) ~= END64 then file.fail("has no zip64 end record at byte %d, where it should be", place) end
  return { place = place, disk = number(r, 17, 4), start_disk = number(r, 21, 4), here = number(r, 25, 8), count = number(r, 33, 8),
           bytes = number(r, 41, 8), offset = number(r, 49, 8) }
end

-- ---------------------------------------------------------------- the directory

-- Values of 0xffffffff stand in the zip64 extra field, in this order.
local function widen(file, e, extra)
  local fields = {}
  for _, field in ipairs { "size", "packed", "header" } do if e[field] == 0xffffffff then fields[#fields + 1] = field end end
  if #fields == 0 then return end
  local at = 1
  while at + 3 <= #extra do
    local id, n = number(extra, at, 2), number(extra, at + 2, 2)
    if id == 1 and n >= 8 * #fields and at + 3 + n <= #extra then
      for i, field in ipairs(fields) do e[field] = number(extra, at + 4 + 8 * (i - 1), 8) end
      return
    end
    at = at + 4 + n
  end
  file.fail("entry '%s' lacks its zip64 sizes", e.name)
end

local function check_entry(file, e)
  if bit.band(e.flags, 1) ~= 0 or bit.band(e.flags, 0x2040) ~= 0 then file.fail("entry '%s' is encrypted: save the model again without", e.name) end
  if e.method ~= 0 then
    file.fail("entry '%s' is compressed (%s): torch.save stores tensors as they are; save the model again with it", e.name,
      methods[e.method] or "method " .. e.method)
  end
  if e.packed ~= e.size then file.fail("entry '%s' is stored in %.0f bytes but has %.0f", e.name, e.packed, e.size) end
end

-- The entries as the central directory lists them.
local function directory(file, last)
  if last.disk ~= 0 or last.start_disk ~= 0 or last.here ~= last.count then file.fail("is one part of a zip archive of several") end
  if last.bytes > MOST_DIRECTORY then file.fail("has a zip directory of %.0f bytes; 64 MiB at most are read", last.bytes) end
  if last.offset + last.bytes > last.place then file.fail("has a zip directory that reaches past its end") end
  local text = file.read(last.offset, last.bytes)
  local entries, at = {}, 1
  for i = 1, last.count do
    if at + 45 > #text or text:sub(at, at + 3) ~= CENTRAL then file.fail("has a zip directory of %.0f entries, number %d is damaged", last.count, i) end
    local name_bytes, extra_bytes, comment_bytes = number(text, at + 28, 2), number(text, at + 30, 2), number(text, at + 32, 2)
    local extra = at + 46 + name_bytes
    if extra + extra_bytes + comment_bytes - 1 > #text then file.fail("has a zip directory whose entry %d reaches past its end", i) end
    local e = { name = text:sub(at + 46, extra - 1), flags = number(text, at + 8, 2), method = number(text, at + 10, 2),
                packed = number(text, at + 20, 4), size = number(text, at + 24, 4), header = number(text, at + 42, 4) }
    widen(file, e, text:sub(extra, extra + extra_bytes - 1))
    entries[i] = e
    at = extra + extra_bytes + comment_bytes
  end
  if at ~= #text + 1 then file.fail("has a zip directory with %d bytes too many", #text + 1 - at) end
  return entries
end

-- Sets where an entry's data begins: behind its own header, whose name and extra field may differ in length from the directory's.
local function place(file, e, stop)
  if e.header + 30 > stop then file.fail("entry '%s' begins outside the file", e.name) end
  local head = file.read(e.header, 30)
  if head:sub(1, 4) ~= LOCAL then file.fail("entry '%s' has no header at byte %.0f, where the directory says", e.name, e.header) end
  local name_bytes = number(head, 27, 2)
  e.offset = e.header + 30 + name_bytes + number(head, 29, 2)
  if e.offset + e.size > stop then file.fail("entry '%s' reaches past the end of the data", e.name) end
  if name_bytes ~= #e.name or file.read(e.header + 30, name_bytes) ~= e.name then
    file.fail("entry '%s' is called otherwise in its own header", e.name)
  end
end

--- Reads the table of contents.
-- @param file table { size, read = function(offset, bytes) -> string, fail = function(format, …) that raises }
-- @param look function(by_name)|nil called when the names are known and nothing else is judged yet
-- @return table[] entries { name, offset, size } in the order of the directory, table the same by name
function M.entries(file, look)
  local last = find_end(file)
  local entries = directory(file, last)
  local by_name, by_place = {}, {}
  for _, e in ipairs(entries) do
    if by_name[e.name] then file.fail("has two entries called '%s'", e.name) end
    by_name[e.name] = e
  end
  if look then look(by_name) end
  for i, e in ipairs(entries) do
    check_entry(file, e)
    place(file, e, last.offset)
    by_place[i] = e
  end
  table.sort(by_place, function(a, b) return a.header < b.header end)
  for i = 2, #by_place do
    local before, e = by_place[i - 1], by_place[i]
    if before.offset + before.size > e.header then file.fail("entries '%s' and '%s' overlap", before.name, e.name) end
  end
  return entries, by_name
end

return M
