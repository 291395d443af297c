--- Reading the pickles of torch.save: enough of the format to know which tensors a file holds, and nothing more.
--
-- A pickle is a program for a stack machine that may call any function of Python. Here it may not: the opcodes that build numbers, texts,
-- tuples, lists and dicts are known, and of the globals only those that stand for tensors, each of which has a harmless meaning of its own
-- below. Everything else is refused by name. All counts are bounded, nothing recurses.
--
-- Values: numbers, strings and booleans are Lua's; { kind = "none" | "tuple" | "list" | "dict" | "set" | "global" | "storage" | "tensor" |
-- "opaque", … }. Tuples and lists have `n` items; dicts `n` keys and values by turns.
-- Sources: Python's pickletools (opcodes); torch/_weights_only_unpickler.py (which globals), torch/_utils.py (their arguments).
-- @module wane.checkpoint.pickle
local ffi = require "ffi"

local M = {}

local MOST_STACK, MOST_MARKS, MOST_STEPS, MOST_OBJECTS, MOST_MEMO = 65536, 64, 2 ^ 24, 10 ^ 6, 4 * 10 ^ 6
local WHOLE = 2 ^ 53                                     -- below it a double holds whole numbers exactly

local none = { kind = "none" }
M.none = none

-- Names of the opcodes, for messages.
local names = {
  ["("] = "MARK", ["."] = "STOP", ["0"] = "POP", ["1"] = "POP_MARK", ["2"] = "DUP", F = "FLOAT", I = "INT", J = "BININT", K = "BININT1", L = "LONG",
  M = "BININT2", N = "NONE", P = "PERSID", Q = "BINPERSID", R = "REDUCE", S = "STRING", T = "BINSTRING", U = "SHORT_BINSTRING", V = "UNICODE",
  X = "BINUNICODE", a = "APPEND", b = "BUILD", c = "GLOBAL", d = "DICT", ["}"] = "EMPTY_DICT", e = "APPENDS", g = "GET", h = "BINGET", i = "INST",
  j = "LONG_BINGET", l = "LIST", ["]"] = "EMPTY_LIST", o = "OBJ", p = "PUT", q = "BINPUT", r = "LONG_BINPUT", s = "SETITEM", t = "TUPLE",
  [")"] = "EMPTY_TUPLE", u = "SETITEMS", G = "BINFLOAT", ["\128"] = "PROTO", ["\129"] = "NEWOBJ", ["\130"] = "EXT1", ["\131"] = "EXT2", ["\132"] = "EXT4",
  ["\133"] = "TUPLE1", ["\134"] = "TUPLE2", ["\135"] = "TUPLE3", ["\136"] = "NEWTRUE", ["\137"] = "NEWFALSE", ["\138"] = "LONG1", ["\139"] = "LONG4",
  B = "BINBYTES", C = "SHORT_BINBYTES", ["\140"] = "SHORT_BINUNICODE", ["\141"] = "BINUNICODE8", ["\142"] = "BINBYTES8", ["\143"] = "EMPTY_SET",
  ["\144"] = "ADDITEMS", ["\145"] = "FROZENSET", ["\146"] = "NEWOBJ_EX", ["\147"] = "STACK_GLOBAL", ["\148"] = "MEMOIZE", ["\149"] = "FRAME",
  ["\150"] = "BYTEARRAY8", ["\151"] = "NEXT_BUFFER", ["\152"] = "READONLY_BUFFER",
}

-- ---------------------------------------------------------------- bytes

---@class wane.PickleReader bytes of a file, from `at` up to `stop`, read as they are needed
local Reader = {}
Reader.__index = Reader

--- A reader over a part of a file.
-- @param file table { size, read = function(offset, bytes) -> string, fail = function(format, …) that raises }
-- @param at integer offset of the first byte
-- @param stop integer offset behind the last
-- @return wane.PickleReader
function M.reader(file, at, stop)
  return setmetatable({ file = file, base = at, stop = stop, buffer = "", next = 1 }, Reader)
end

--- Offset in the file of the next byte.
function Reader:offset() return self.base + self.next - 1 end

--- The next `n` bytes.
function Reader:take(n)
  if self.next + n - 1 > #self.buffer then
    local at, rest = self:offset(), self.buffer:sub(self.next)
    if at + n > self.stop then self.file.fail("pickle: ends at byte %.0f in the middle of a value (%d bytes were expected): it is truncated", self.stop, n) end
    local more = math.min(math.max(n, 65536), self.stop - at) - #rest
    self.base, self.buffer, self.next = at, rest .. self.file.read(at + #rest, more), 1
  end
  local from = self.next
  self.next = from + n
  return self.buffer:sub(from, from + n - 1)
end

--- The bytes up to the next newline, which is taken too.
function Reader:line()
  local at, bytes = self:offset(), {}
  for i = 1, 256 do
    bytes[i] = self:take(1)
    if bytes[i] == "\n" then return table.concat(bytes, "", 1, i - 1) end
  end
  self.file.fail("pickle, byte %.0f: a name without end", at)
end

--- The next `n` bytes as an unsigned little-endian number.
function Reader:number(n)
  local s, value = self:take(n), 0
  for i = n, 1, -1 do value = value * 256 + s:byte(i) end
  return value
end

-- ---------------------------------------------------------------- the machine




-- Fails at the opcode being run.
local function fail(self, message, ...)
  self.reader.file.fail("pickle, byte %.0f: " .. message, self.here, ...)
end

local function push(self, value)
  local n = self.n + 1
  if n > MOST_STACK then fail(self, "more than %d values on the stack: no state dict needs that", MOST_STACK) end
  self.stack[n], self.n = value, n
end

local function pop(self)
  local n = self.n
  if n <= (self.marks[#self.marks] or 0) then fail(self, "%s needs a value that is not there: the pickle is damaged", self.op) end
  local value = self.stack[n]
  self.stack[n], self.n = nil, n - 1
  return value
end

local function kind_of(value) return type(value) == "table" and value.kind or type(value) end

local function object(self, kind)
  self.objects = self.objects + 1
  if self.objects > MOST_OBJECTS then fail(self, "more than %d objects: no checkpoint has that many", MOST_OBJECTS) end
  return { kind = kind, n = 0 }
end

-- Moves the values above the last mark into `target`.
local function take_marked(self, target)
  local from = table.remove(self.marks)
  if not from then fail(self, "%s without a MARK: the pickle is damaged", self.op) end
  local count = self.n - from
  for i = 1, count do
    target[target.n + i] = self.stack[from + i]
    self.stack[from + i] = nil
  end
  target.n, self.n = target.n + count, from
  return count
end

-- A container that the next items go to: on top once they are taken off.
local function target(self, kind, below)
  local value = self.stack[below or self.n]
  if kind_of(value) ~= kind then fail(self, "%s on a %s, a %s was expected", self.op, kind_of(value), kind) end
  return value
end

local function tuple(self, count)
  local t = object(self, "tuple")
  for i = count, 1, -1 do t[i] = pop(self) end
  t.n = count
  push(self, t)
end

-- ---------------------------------------------------------------- globals

-- Names of dtypes as safetensors spells them, and bytes of a value.
local dtypes = {
  float32 = "F32", float64 = "F64", float16 = "F16", bfloat16 = "BF16", int64 = "I64", int32 = "I32", int16 = "I16", int8 = "I8", uint8 = "U8",
  bool = "BOOL", uint16 = "U16", uint32 = "U32", uint64 = "U64", float8_e4m3fn = "F8_E4M3", float8_e5m2 = "F8_E5M2", float8_e4m3fnuz = "F8_E4M3FNUZ",
  float8_e5m2fnuz = "F8_E5M2FNUZ", float8_e8m0fnu = "F8_E8M0", complex64 = "C64", complex128 = "C128",
}
local widths = { F32 = 4, F64 = 8, F16 = 2, BF16 = 2, I64 = 8, I32 = 4, I16 = 2, I8 = 1, U8 = 1, BOOL = 1, U16 = 2, U32 = 4, U64 = 8, F8_E4M3 = 1,
                 F8_E5M2 = 1, F8_E4M3FNUZ = 1, F8_E5M2FNUZ = 1, F8_E8M0 = 1, C64 = 8, C128 = 16 }
local storages = {
  FloatStorage = "F32", DoubleStorage = "F64", HalfStorage = "F16", BFloat16Storage = "BF16", LongStorage = "I64", IntStorage = "I32", ShortStorage = "I16",
  CharStorage = "I8", ByteStorage = "U8", BoolStorage = "BOOL", ComplexFloatStorage = "C64", ComplexDoubleStorage = "C128",
}

-- A whole number that may be a size, a stride or an offset.
local function whole(self, value, what)
  if type(value) ~= "number" or value < 0 or value >= WHOLE or value ~= math.floor(value) then
    fail(self, "%s of a tensor is %s, a whole number from 0 on was expected", what, type(value) == "number" and ("%.17g"):format(value) or kind_of(value))
  end
  return value
end

local function wholes(self, list, what)
  if kind_of(list) ~= "tuple" and kind_of(list) ~= "list" then fail(self, "the %s of a tensor is a %s, a tuple was expected", what, kind_of(list)) end
  if list.n > 8 then fail(self, "a tensor of %d dimensions: 8 at most", list.n) end
  local out = {}
  for i = 1, list.n do out[i] = whole(self, list[i], what) end
  return out
end

-- A tensor over a storage. `dtype`: where it is not the storage's own.
local function tensor(self, args, dtype)
  local storage = args[1]
  if kind_of(storage) ~= "storage" then fail(self, "a tensor over a %s, a storage was expected", kind_of(storage)) end
  local t = object(self, "tensor")
  t.storage, t.dtype, t.offset = storage, dtype or storage.dtype, whole(self, args[2], "offset")
  t.width = widths[t.dtype]
  t.shape, t.stride = wholes(self, args[3], "shape"), wholes(self, args[4], "stride")
  if #t.shape ~= #t.stride then fail(self, "a tensor of %d sizes and %d strides", #t.shape, #t.stride) end
  return t
end

-- The 7th or 8th argument: { conj = true } changes nothing in real numbers, { neg = true } would.
local function check_bits(self, metadata)
  if kind_of(metadata) ~= "dict" then return end
  for i = 1, metadata.n, 2 do
    if metadata[i + 1] == true then fail(self, "a tensor whose values are lazily changed ('%s'): save its .resolve_neg()", tostring(metadata[i])) end
  end
end

local function is_tensor(self, value)
  if kind_of(value) ~= "tensor" then fail(self, "a parameter over a %s, a tensor was expected", kind_of(value)) end
  return value
end

local calls = {}                                         -- by full name: function(self, args) -> value
local function opaque(self) return object(self, "opaque") end

calls["collections.OrderedDict"] = function(self, args)
  if args.n > 0 then fail(self, "an OrderedDict with arguments: empty ones are known") end
  return object(self, "dict")
end
calls["torch._utils._rebuild_tensor"] = function(self, args) return tensor(self, args) end
calls["torch._utils._rebuild_tensor_v2"] = function(self, args)
  check_bits(self, args[7])
  return tensor(self, args)
end
calls["torch._utils._rebuild_tensor_v3"] = function(self, args)
  if kind_of(args[7]) ~= "global" or not args[7].dtype then fail(self, "a tensor whose dtype is a %s", kind_of(args[7])) end
  check_bits(self, args[8])
  return tensor(self, args, args[7].dtype)
end
calls["torch._utils._rebuild_parameter"] = function(self, args) return is_tensor(self, args[1]) end
calls["torch._utils._rebuild_parameter_with_state"] = calls["torch._utils._rebuild_parameter"]
calls["torch.nn.parameter.Parameter"] = calls["torch._utils._rebuild_parameter"]
-- A tensor with Python attributes: (function, class, arguments, attributes); other classes than torch's own stand for other things.
calls["torch._tensor._rebuild_from_type_v2"] = function(self, args)
  local call, class = args[1], args[2]
  if kind_of(call) ~= "global" or not call.rebuilds or kind_of(args[3]) ~= "tuple" then fail(self, "a tensor rebuilt by a %s", kind_of(call)) end
  if kind_of(class) ~= "global" or (class.name ~= "torch.Tensor" and class.name ~= "torch.nn.parameter.Parameter") then
    fail(self, "a tensor of class %s: plain tensors are known", kind_of(class) == "global" and class.name or kind_of(class))
  end
  return calls[call.name](self, args[3])
end
calls["torch.Size"] = function(self, args)
  if kind_of(args[1]) ~= "tuple" and kind_of(args[1]) ~= "list" then fail(self, "a torch.Size of a %s", kind_of(args[1])) end
  return args[1]
end
for _, name in ipairs { "torch.device", "_codecs.encode", "builtins.set", "builtins.bytearray", "builtins.complex", "__builtin__.set", "__builtin__.bytearray",
                        "__builtin__.complex", "collections.Counter" } do calls[name] = opaque end

-- What a GLOBAL stands for; nil for what is not known. Tensors of a GPU are saved under torch.cuda.
local known = {}
local function global(name)
  if known[name] then return known[name] end
  local short = name:match "^torch%.cuda%.(%w+)$" or name:match "^torch%.storage%.(%w+)$" or name:match "^torch%.(%w+)$"
  local g = { kind = "global", name = name }
  if calls[name] then g.rebuilds = name:find "^torch%._utils%._rebuild_" ~= nil
  elseif short == "UntypedStorage" or short == "TypedStorage" then g.storage = "U8"
  elseif short and storages[short] then g.storage = storages[short]
  elseif dtypes[name:match "^torch%.([%w_]+)$" or ""] then g.dtype = dtypes[name:match "^torch%.(.*)$"]
  elseif name ~= "torch.Tensor" then return nil end
  known[name] = g
  return g
end

--- Bytes of a value of a dtype, or nil.
function M.width(dtype) return widths[dtype] end

-- ---------------------------------------------------------------- opcodes

local run = {}

run["\128"] = function(self)                             -- PROTO
  local version = self.reader:take(1):byte()
  if version > 5 then fail(self, "protocol %d: 2 was expected", version) end
end
run["("] = function(self)
  if #self.marks >= MOST_MARKS then fail(self, "more than %d nested MARKs: no state dict needs that", MOST_MARKS) end
  self.marks[#self.marks + 1] = self.n
end
run["N"] = function(self) push(self, none) end
run["\136"] = function(self) push(self, true) end
run["\137"] = function(self) push(self, false) end
run["K"] = function(self) push(self, self.reader:number(1)) end
run["M"] = function(self) push(self, self.reader:number(2)) end
run["J"] = function(self)
  local value = self.reader:number(4)
  push(self, value >= 2 ^ 31 and value - 2 ^ 32 or value)
end
run["\138"] = function(self)                             -- LONG1: two's complement of any length
  local s, value = self.reader:take(self.reader:number(1)), 0
  for i = #s, 1, -1 do value = value * 256 + s:byte(i) end
  if #s > 0 and s:byte(-1) >= 128 then value = value - 256 ^ #s end
  push(self, value)
end
run["G"] = function(self)                                -- big-endian
  local box = ffi.new "double[1]"
  ffi.copy(box, self.reader:take(8):reverse(), 8)
  push(self, box[0])
end
run["X"] = function(self) push(self, self.reader:take(self.reader:number(4))) end
run["U"] = function(self) push(self, self.reader:take(self.reader:number(1))) end
run[")"] = function(self) push(self, object(self, "tuple")) end
run["]"] = function(self) push(self, object(self, "list")) end
run["}"] = function(self) push(self, object(self, "dict")) end
run["\143"] = function(self) push(self, object(self, "set")) end
run["\133"] = function(self) tuple(self, 1) end
run["\134"] = function(self) tuple(self, 2) end
run["\135"] = function(self) tuple(self, 3) end
run["t"] = function(self)
  local t = object(self, "tuple")
  take_marked(self, t)
  push(self, t)
end
run["a"] = function(self)
  local value = pop(self)
  local list = target(self, "list")
  list.n = list.n + 1
  list[list.n] = value
end
run["e"] = function(self) take_marked(self, target(self, "list", self.marks[#self.marks])) end
run["s"] = function(self)
  local value, key = pop(self), pop(self)
  local dict = target(self, "dict")
  dict[dict.n + 1], dict[dict.n + 2], dict.n = key, value, dict.n + 2
end
run["u"] = function(self)
  if take_marked(self, target(self, "dict", self.marks[#self.marks])) % 2 ~= 0 then fail(self, "SETITEMS with a key that has no value") end
end
run["b"] = function(self)                                -- the attributes of an OrderedDict (_metadata) are of no interest
  pop(self)
  target(self, "dict")
end

local function put(self, slot)
  local value = pop(self)
  push(self, value)
  if self.memo[slot] == nil then self.memos = self.memos + 1 end
  if self.memos > MOST_MEMO then fail(self, "more than %d remembered values: no checkpoint has that many", MOST_MEMO) end
  self.memo[slot] = value
end
local function get(self, slot)
  local value = self.memo[slot]
  if value == nil then fail(self, "value number %d is used before it was made: the pickle is damaged", slot) end
  push(self, value)
end
run["q"] = function(self) put(self, self.reader:number(1)) end
run["r"] = function(self) put(self, self.reader:number(4)) end
run["h"] = function(self) get(self, self.reader:number(1)) end
run["j"] = function(self) get(self, self.reader:number(4)) end

-- Text of a file for a message: one line, nothing that a terminal obeys.
local function shown(text) return (text:sub(1, 120):gsub("[^\32-\126]", "?")) end

run["c"] = function(self)
  local module, name = self.reader:line(), self.reader:line()
  local full = module .. "." .. name
  local g = global(full)
  if not g then
    fail(self, "it wants to use '%s', which is no part of a state dict of plain tensors. wane runs nothing that a file brings along; "
      .. "if you trust the file, load it with torch and save model.state_dict()", shown(full))
  end
  push(self, g)
end

local function call(self)
  local args, callee = pop(self), pop(self)
  if kind_of(callee) ~= "global" or not calls[callee.name] then
    fail(self, "%s of a %s: only the functions that rebuild tensors may be called", self.op, kind_of(callee) == "global" and callee.name or kind_of(callee))
  end
  if kind_of(args) ~= "tuple" then fail(self, "%s of %s with a %s instead of a tuple", self.op, callee.name, kind_of(args)) end
  push(self, calls[callee.name](self, args))
end
run["R"], run["\129"] = call, call

-- ("storage", class, key, device, numel[, view]): the caller knows where storages are.
run["Q"] = function(self)
  local id = pop(self)
  if kind_of(id) ~= "tuple" or id.n < 5 or id[1] ~= "storage" then fail(self, "a persistent id that is no storage") end
  local class, key = id[2], id[3]
  if kind_of(class) ~= "global" or not class.storage then
    fail(self, "a storage of class %s: plain ones are known", kind_of(class) == "global" and class.name or kind_of(class))
  end
  if type(key) == "number" then key = ("%.0f"):format(key) end
  if type(key) ~= "string" then fail(self, "a storage whose key is a %s", kind_of(key)) end
  local storage = object(self, "storage")
  storage.dtype, storage.width, storage.key, storage.count = class.storage, widths[class.storage], key, whole(self, id[5], "storage size")
  local view = id[6]
  if kind_of(view) == "tuple" then
    if type(view[1]) ~= "string" then fail(self, "a view of a storage whose key is a %s", kind_of(view[1])) end
    storage.view = { key = view[1], offset = whole(self, view[2], "view offset"), count = whole(self, view[3], "view size") }
  elseif id.n > 5 and view ~= none then
    fail(self, "a view of a storage described by a %s", kind_of(view))
  end
  self.storages[#self.storages + 1] = storage
  push(self, storage)
end

--- Reads one pickle, up to and with its STOP.
-- @param reader wane.PickleReader
-- @return any value, table[] the storages it names { kind, dtype, width, key, count, view = nil | { key, offset, count } }
function M.read(reader)
  local self = { reader = reader, stack = {}, n = 0, marks = {}, memo = {}, memos = 0, objects = 0, storages = {} }
  for _ = 1, MOST_STEPS do
    self.here = reader:offset()
    local op = reader:take(1)
    self.op = names[op]
    if op == "." then return pop(self), self.storages end
    local step = run[op]
    if not step then
      fail(self, "opcode %s is none that torch.save writes for tensors (protocol 2 was expected). Save the model again with torch.save's defaults",
        names[op] or ("0x%02x"):format(op:byte()))
    end
    step(self)
  end
  fail(self, "more than %d steps: no checkpoint needs that many", MOST_STEPS)
end

return M
