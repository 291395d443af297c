--- Making small (and broken) files for the reader's specs, and looking at tensors' bytes.
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C
local Tensor = require "wane.tensor"

local M = {}

-- ---------------------------------------------------------------- temporary folders

local folders = {}
local in_memory = os.execute "test -d /dev/shm -a -w /dev/shm" == 0      -- thousands of small files are quicker there

--- A new empty folder, removed by M.clean().
function M.folder()
  local path = os.tmpname()
  os.remove(path)
  if in_memory then path = path:gsub("^/tmp/", "/dev/shm/") end
  assert(os.execute("mkdir -p '" .. path .. "'"))
  folders[#folders + 1] = path
  return path
end

function M.clean()
  for _, path in ipairs(folders) do os.execute("rm -rf '" .. path .. "'") end
  folders = {}
end

function M.write(path, text)
  local f = assert(io.open(path, "wb"))
  assert(f:write(text))
  f:close()
  return path
end

function M.read(path)
  local f = assert(io.open(path, "rb"))
  local text = f:read "*a"
  f:close()
  return text
end

-- ---------------------------------------------------------------- little-endian numbers

--- An unsigned number as `bytes` little-endian bytes; negative ones are two's complement.
function M.le(n, bytes)
  local out = {}
  for i = 1, bytes do
    out[i] = string.char(n % 256)
    n = math.floor(n / 256)
  end
  return table.concat(out)
end

function M.u32(n) return M.le(n, 4) end
function M.u64(n) return M.le(n, 8) end

--- A safetensors file of a header text and data.
function M.safetensors(header, data) return M.u64(#header) .. header .. (data or "") end

--- A GGUF string.
function M.gguf_string(s) return M.u64(#s) .. s end

--- A GGUF file: pairs are encoded texts, infos { name, dims (fastest first), type, offset }, data follows at the alignment.
function M.gguf(pairs_, infos, data, version)
  local out = { "GGUF", M.u32(version or 3), M.u64(#infos), M.u64(#pairs_), table.concat(pairs_) }
  for _, t in ipairs(infos) do
    out[#out + 1] = M.gguf_string(t[1]) .. M.u32(#t[2])
    for _, d in ipairs(t[2]) do out[#out + 1] = M.u64(d) end
    out[#out + 1] = M.u32(t[3]) .. M.u64(t[4])
  end
  local head = table.concat(out)
  return head .. ("\0"):rep(-#head % 32) .. (data or "")
end

function M.gguf_pair(key, kind, bytes) return M.gguf_string(key) .. M.u32(kind) .. bytes end

-- ---------------------------------------------------------------- tensors

--- A tensor's bytes, once its ops have run.
function M.bytes(t)
  assert(core.wait() == 0)
  local info = core.info_type()
  core.check(C.wane_tensor_info(t.h, info))
  local n = tonumber(info.nbytes)
  local buffer = ffi.new("char[?]", math.max(n, 1))
  core.check(C.wane_tensor_read(core.stream(), t.h, buffer, n))
  return ffi.string(buffer, n)
end

--- f32 values as a C array and their number.
function M.floats(t)
  assert(t:dtype() == "f32")
  local text = M.bytes(t)
  local n = #text / 4
  local out = ffi.new("float[?]", math.max(n, 1))
  ffi.copy(out, text, #text)
  return out, n
end

--- Bytes of every part of a quantized tensor, by part number.
function M.parts(q)
  local out = {}
  for part = 0, C.WANE_PARTS - 1 do
    local h = core.handle_type()
    if C.wane_quantized_part(core.stream(), h, q.h, part) == 0 then
      local t = Tensor.wrap(h)
      out[part] = M.bytes(t)
      t:close()
    end
  end
  return out
end

--- A tensor from bytes.
function M.tensor(dtype, shape, text)
  local h = core.handle_type()
  local sizes, n = core.shape(shape)
  core.check(C.wane_tensor_new(core.stream(), h, core.dtype(dtype), n, sizes))
  core.check(C.wane_tensor_upload(core.stream(), h, text, #text))
  return Tensor.wrap(h)
end

--- Quantizes a tensor the plain way, whole and in memory.
function M.quantize(t, kind, block_size, nested)
  local h = core.handle_type()
  core.check(C.wane_quantize(core.stream(), h, t.h, core.dtype(kind), block_size or 0, nested and 1 or 0))
  return Tensor.wrap(h)
end

--- A repeatable generator: r(n) gives a whole number in [0, n).
function M.random(seed)
  local state = seed
  return function(n)
    state = (state * 16807) % 2147483647
    return state % n
  end
end

return M
