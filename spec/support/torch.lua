--- Files of torch.save made by hand, whole or broken.
local files = require "support.files"

local M = {}

--- A zip archive of entries { name, bytes, [flags, method, size, header] }: what is not given is as it should be.
-- @return string, integer offset of the directory, integer its bytes
function M.zip(entries)
  local body, directory, places = {}, {}, 0
  for _, e in ipairs(entries) do
    local name, data = e[1], e[2]
    local place = e.header or places
    local head = "PK\3\4" .. files.le(20, 2) .. files.le(e.flags or 0, 2) .. files.le(e.method or 0, 2) .. files.u32(0) .. files.u32(0)
      .. files.u32(#data) .. files.u32(e.size or #data) .. files.le(#(e.inner or name), 2) .. files.le(0, 2) .. (e.inner or name)
    directory[#directory + 1] = "PK\1\2" .. files.le(20, 2) .. files.le(20, 2) .. files.le(e.flags or 0, 2) .. files.le(e.method or 0, 2) .. files.u32(0)
      .. files.u32(0) .. files.u32(e.packed or #data) .. files.u32(e.size or #data) .. files.le(#name, 2) .. files.le(#(e.extra or ""), 2) .. files.le(0, 2)
      .. files.le(0, 2) .. files.le(0, 2) .. files.u32(0) .. files.u32(place) .. name .. (e.extra or "")
    body[#body + 1] = head .. data
    places = places + #head + #data
  end
  local central = table.concat(directory)
  return table.concat(body) .. central .. "PK\5\6" .. files.le(0, 2) .. files.le(0, 2) .. files.le(#entries, 2) .. files.le(#entries, 2)
    .. files.u32(#central) .. files.u32(places) .. files.le(0, 2), places, #central
end

--- Pickles by hand: a text, a global, a storage of `count` values, a tensor over one (shape and stride: opcodes that make tuples), a dict.
function M.text(s) return "X" .. files.u32(#s) .. s end
function M.global(module, name) return "c" .. module .. "\n" .. name .. "\n" end
M.rebuild, M.ordered = M.global("torch._utils", "_rebuild_tensor_v2"), M.global("collections", "OrderedDict")
function M.storage(class, key, count)
  return "(" .. M.text "storage" .. class .. M.text(key) .. M.text "cpu" .. "J" .. files.u32(count) .. "tQ"
end
function M.tensor(from, offset, shape, stride)
  return M.rebuild .. "(" .. from .. "J" .. files.u32(offset) .. shape .. stride .. "\137" .. M.ordered .. ")RtR"
end
function M.dict(...) return "\128\2}(" .. table.concat { ... } .. "u." end

local function sizes(list)
  local out = { "(" }
  for _, n in ipairs(list) do out[#out + 1] = "J" .. files.u32(n) end
  return table.concat(out) .. "t"
end

--- An archive of tensors over one storage, matrices as transposed views.
-- @param class string "FloatStorage" or "DoubleStorage"
-- @param entries table[] { name, shape, offset (in values) }
-- @param data string the storage's bytes: of each matrix its transpose
-- @param count integer values of it
function M.archive(class, entries, data, count)
  local items = {}
  for _, e in ipairs(entries) do
    items[#items + 1] = M.text(e.name)
    local stride = #e.shape == 2 and { 1, e.shape[1] } or { 1 }
    items[#items + 1] = M.tensor(M.storage(M.global("torch", class), "0", count), e.offset, sizes(e.shape), sizes(stride))
  end
  return (M.zip { { "m/data.pkl", M.dict(unpack(items)) }, { "m/data/0", data } })
end

return M
