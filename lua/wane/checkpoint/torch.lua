--- Files of torch.save as checkpoints: pytorch_model.bin, of today (a zip archive) and of before torch 1.6 (pickles one after another).
--
-- Finds out which tensors a file holds and where their bytes lie, and tells the index in C; from there on they are mapped, read and
-- quantized like any others. What is accepted is a dict from names to tensors, as transformers writes and reads; values in it that are no
-- tensors are passed over. Sources: torch/serialization.py (_load, _legacy_load), caffe2/serialize/inline_container.h.
-- @module wane.checkpoint.torch
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C
local pickle = require "wane.checkpoint.pickle"
local zip = require "wane.checkpoint.zip"

local M = {}

local MOST_PICKLE = 64 * 2 ^ 20
local REPEATED_MOST, REPEATS = 16 * 2 ^ 20, 4
local MAGIC = "\128\2\138\10\108\252\156\70\249\32\106\168\80\25\46"          -- the pickled number 0x1950a86a20f9469cfc6c

-- ---------------------------------------------------------------- bytes of a file

-- A failure on its way to M.describe; other errors pass through as they are.
local Failure = {}

local function throw(message, code) error(setmetatable({ message = message, code = code }, Failure), 0) end

-- What zip and pickle read through: file number `number` of an index.
local function file_of(ix, number)
  local path = ffi.string(C.wane_index_path(ix:live(), number))
  local file = { number = number, path = path, size = tonumber(C.wane_index_file_size(ix:live(), number)) }
  function file.fail(message, ...) throw(("'%s' " .. message):format(path, ...), "WANE_E_FORMAT") end
  function file.read(offset, bytes)
    local buffer = ffi.new("char[?]", math.max(bytes, 1))
    local status = C.wane_index_file_read(ix:live(), number, offset, buffer, bytes)
    if status < 0 then
      local _, reason, code = core.failure(status)
      throw(reason, code)
    end
    return ffi.string(buffer, bytes)
  end
  return file
end

-- ---------------------------------------------------------------- storages

-- Sets where a storage's bytes lie and how many there are.
local function place(file, storage, offset, bytes)
  if storage.count * storage.width > bytes then
    file.fail("storage '%s' has %.0f bytes, its %.0f %s values need %.0f", storage.key, bytes, storage.count, storage.dtype, storage.count * storage.width)
  end
  storage.at, storage.bytes = offset, storage.count * storage.width
end

local function read_zip(file)
  local entries, by_name = zip.entries(file, function(by_name)
    for name in pairs(by_name) do
      if name:find "^[^/]+/constants%.pkl$" then file.fail("holds a TorchScript program, a state dict was expected: save model.state_dict()") end
    end
  end)
  local top = entries[1] and entries[1].name:match "^([^/]+)/"
  local data = top and by_name[top .. "/data.pkl"]
  if not data then file.fail("is a zip archive without data.pkl in its top folder: no file of torch.save") end
  local order = by_name[top .. "/byteorder"]
  if order and (order.size > 16 or file.read(order.offset, order.size) ~= "little") then
    file.fail("was written on a big-endian machine: load it with torch there and save it as safetensors")
  end
  if data.size > MOST_PICKLE then file.fail("has a pickle of %.0f bytes; 64 MiB at most are read", data.size) end
  local value, storages = pickle.read(pickle.reader(file, data.offset, data.offset + data.size))
  for _, s in ipairs(storages) do
    local e = by_name[top .. "/data/" .. s.key]
    if not e then file.fail("has no entry for storage '%s', which its tensors use", s.key) end
    if s.view then file.fail("has a view of storage '%s', which only the format before the archive knows", s.key) end
    place(file, s, e.offset, e.size)
  end
  return value
end

-- The value of a key of a pickled dict, or nil.
local function field(dict, key)
  if type(dict) ~= "table" or dict.kind ~= "dict" then return nil end
  for i = 1, dict.n, 2 do if dict[i] == key then return dict[i + 1] end end
end

-- The older format: magic number, protocol version, facts about the machine, the object, the list of storages, then each
-- storage's number of values (i64) and its values.
local function read_legacy(file)
  local reader = pickle.reader(file, #MAGIC, math.min(file.size, MOST_PICKLE))
  local version = pickle.read(reader)
  if version ~= 1001 then file.fail("is written in version %s of torch's older format, 1001 was expected", tostring(version)) end
  local machine = pickle.read(reader)
  if field(machine, "little_endian") ~= true then
    file.fail("was written on a big-endian machine: load it with torch there and save it as safetensors")
  end
  local value, storages = pickle.read(reader)
  local keys = pickle.read(reader)
  if type(keys) ~= "table" or keys.kind ~= "list" then file.fail("has no list of storages behind its tensors") end
  local named, by_key = {}, {}
  for _, s in ipairs(storages) do named[s.key] = named[s.key] or s end
  local at = reader:offset()
  for i = 1, keys.n do
    local s = named[keys[i]]
    if not s then file.fail("has a storage '%s' that no tensor uses: its size is unknown", tostring(keys[i]):sub(1, 40)) end
    if by_key[s.key] then file.fail("lists storage '%s' twice", s.key) end
    if at + 8 > file.size then file.fail("is truncated: it ends before storage '%s'", s.key) end
    local count = zip.number(file.read(at, 8), 1, 8)
    if count ~= s.count then file.fail("has %.0f values in storage '%s', its tensors say %.0f", count, s.key, s.count) end
    local bytes = s.count * s.width
    if at + 8 + bytes > file.size then file.fail("is truncated: storage '%s' needs %.0f bytes, %.0f are left", s.key, bytes, file.size - at - 8) end
    by_key[s.key] = { at = at + 8, bytes = bytes }
    at = at + 8 + bytes
  end
  for _, s in ipairs(storages) do
    local root = by_key[s.key]
    if not root then file.fail("does not hold storage '%s', which its tensors use", s.key) end
    local from = s.view and s.view.offset * s.width or 0
    if from > root.bytes then file.fail("has a view that begins past the end of storage '%s'", s.key) end
    if s.view then s.count = s.view.count end
    place(file, s, root.at + from, root.bytes - from)
  end
  return value
end

-- ---------------------------------------------------------------- tensors

-- Do the strides describe the shape's own order? Dimensions of one element may say anything.
local function is_contiguous(t)
  local step = 1
  for i = #t.shape, 1, -1 do
    if t.shape[i] ~= 1 and t.stride[i] ~= step then return false end
    step = step * t.shape[i]
  end
  return true
end

-- Values from the first to the last that a tensor reaches; 0 for none.
local function span_of(t)
  local last = 0
  for i, size in ipairs(t.shape) do
    if size == 0 then return 0 end
    last = last + (size - 1) * t.stride[i]
  end
  return last + 1
end

local raw = ffi.new "wane_entry"

-- A tensor whose strides repeat values is longer in memory than in its file; this much more, and it is made to fill the memory.
local function check_repeats(file, name, t)
  local bytes = t.width
  for _, size in ipairs(t.shape) do bytes = bytes * size end
  if bytes > REPEATED_MOST + REPEATS * file.size then
    file.fail("tensor '%s' repeats its values to %.0f bytes, far more than the file has: it is damaged or a trap", name, bytes)
  end
end

-- Tells the index of one tensor.
local function describe(ix, file, name, t)
  if name == "" or name:find "[%z\1-\31\127]" then
    file.fail("has a tensor called '%s': a name of printable characters was expected", (name:gsub("[^\32-\126]", "?")))
  end
  local s, span = t.storage, span_of(t)
  if not t.width then file.fail("tensor '%s' has a dtype of unknown size", name) end
  if span > 0 and (t.offset + span) * t.width > s.bytes then
    file.fail("tensor '%s' reaches to byte %.0f of a storage of %.0f", name, (t.offset + span) * t.width, s.bytes)
  end
  check_repeats(file, name, t)
  ffi.fill(raw, ffi.sizeof(raw))
  raw.name, raw.dtype_name, raw.file, raw.ndim = name, t.dtype, file.number, #t.shape
  raw.offset, raw.bytes = s.at + (span > 0 and t.offset * t.width or 0), span * t.width
  for i, size in ipairs(t.shape) do raw.shape[i - 1] = size end
  if span > 0 and not is_contiguous(t) then
    raw.strided = 1
    for i, step in ipairs(t.stride) do raw.stride[i - 1] = step end
  end
  local status = C.wane_index_describe(ix:live(), raw)
  if status < 0 then
    local _, reason, code = core.failure(status)
    throw(reason, code)
  end
end

-- A dict without tensors: perhaps they are one level deeper, where transformers does not look either.
local function explain_empty(file, dict)
  for i = 1, dict.n, 2 do
    local inner = dict[i + 1]
    if type(dict[i]) == "string" and type(inner) == "table" and inner.kind == "dict" then
      for j = 2, inner.n, 2 do
        if type(inner[j]) == "table" and inner[j].kind == "tensor" then
          file.fail("holds its tensors under '%s', a dict from names to tensors was expected: load it with torch and save that part alone", dict[i]:sub(1, 80))
        end
      end
    end
  end
  if dict.n > 0 then file.fail("holds no tensors, a dict from names to tensors was expected") end
end

local function describe_file(ix, number)
  local file = file_of(ix, number)
  local head = file.read(0, math.min(file.size, 512))
  local value
  if head:sub(1, 2) == "PK" then value = read_zip(file)
  elseif head:sub(1, #MAGIC) == MAGIC then value = read_legacy(file)
  elseif head:sub(258, 262) == "ustar" then file.fail("was written by torch 0.1 (a tar archive): load it with a newer torch and save it again")
  else file.fail("is no file of torch.save: it begins neither as a zip archive nor with torch's magic number") end
  if type(value) ~= "table" or value.kind ~= "dict" then
    file.fail("holds a %s, a dict from names to tensors was expected", type(value) == "table" and value.kind or type(value))
  end
  local found, seen = false, {}
  for i = value.n - 1, 1, -2 do                          -- a key that is set twice keeps its last value
    local name, t = value[i], value[i + 1]
    if type(name) == "string" and type(t) == "table" and t.kind == "tensor" and not seen[name] then seen[name], found = i, true
    elseif type(name) == "string" then seen[name] = seen[name] or 0 end
  end
  for i = 1, value.n, 2 do if seen[value[i]] == i then describe(ix, file, value[i], value[i + 1]) end end
  if not found then explain_empty(file, value) end
end

-- What a list of shards says must be where it says.
local function check_list(ix)
  for _, name in ipairs(ix:keys()) do
    local e, want = ix:find(name), ix:meta(name)
    if not e or e.file ~= want then
      local files = ix:files()
      throw(("tensor '%s' should be in '%s' (says '%s') but is in %s: a file is of another model"):format(name, files[want + 1], ix.path,
        e and "'" .. files[e.file + 1] .. "'" or "no shard"), "WANE_E_FORMAT")
    end
  end
end

--- Describes the tensors of an index of torch files, single or a list.
-- @param ix wane.Index just opened
-- @return true|nil, string|nil message, string|nil code
function M.describe(ix)
  local ok, problem = pcall(function()
    for number = 0, #ix:files() - 1 do describe_file(ix, number) end
    check_list(ix)
  end)
  if ok then return true end
  if getmetatable(problem) ~= Failure then error(problem, 0) end
  return nil, problem.message, problem.code
end

return M
