--- Files and folders as readers and writers need them: sizes, listings, which path is which place, and which files are a model's own.
-- @module wane.checkpoint.paths
local ffi = require "ffi"
local core = require "wane.core"
local C = core.C

local M = {}

ffi.cdef "char *realpath(const char *, char *);"
local path_buffer = ffi.new "char[4096]"                -- PATH_MAX

--- The path without links and dots, or nil where nothing is there.
-- @param path string
-- @return string|nil
function M.real(path)
  return ffi.C.realpath(path, path_buffer) ~= nil and ffi.string(path_buffer) or nil
end

--- Is there a file of that name?
-- @param path string
-- @return boolean
function M.is_file(path) return C.wane_path_kind(path) == C.WANE_PATH_FILE end

--- Is there a folder of that name?
-- @param path string
-- @return boolean
function M.is_folder(path) return C.wane_path_kind(path) == C.WANE_PATH_FOLDER end

--- Size and time of the last change of a file.
-- @param path string
-- @return number|nil bytes, string message or a text that differs once the file was changed, string|nil code
function M.stat(path)
  local bytes, changed = ffi.new "uint64_t[1]", ffi.new "int64_t[1]"
  local status = C.wane_path_stat(path, bytes, changed)
  if status < 0 then return core.failure(status) end
  return tonumber(bytes[0]), (tostring(changed[0]):gsub("LL$", ""))
end

--- Names in a folder, sorted; an empty list where it cannot be read.
-- @param path string
-- @return string[]
function M.list(path)
  local names, room = {}, tonumber(C.wane_path_list(path, nil, 0))
  while room > 0 do
    local buffer = ffi.new("char[?]", room)
    local used = tonumber(C.wane_path_list(path, buffer, room))
    if used <= room then
      for name in ffi.string(buffer, math.max(used, 0)):gmatch "[^%z]+" do names[#names + 1] = name end
      break
    end
    room = used                                        -- files came in between
  end
  table.sort(names)
  return names
end

--- Flushes a folder to the disk: what was renamed or removed in it stays so when the machine goes down. Waits as the host waits.
-- @param path string
function M.flush(path)
  local box = ffi.new "wane_job *[1]"
  core.check(C.wane_path_flush(box, path))
  core.wait_job(ffi.gc(box[0], C.wane_job_free))
end

-- ---------------------------------------------------------------- checksums

--- A checksum as a text.
-- @param hash uint64_t
-- @return string 16 hexadecimal digits
function M.hex(hash) return ("%08x%08x"):format(tonumber(hash / 0x100000000ULL), tonumber(hash % 0x100000000ULL)) end

--- XXH64 of a text.
-- @param text string
-- @return string 16 hexadecimal digits
function M.hash_text(text) return M.hex(C.wane_hash(text, #text)) end

--- XXH64 of a file's bytes, which are read once, off the main thread.
-- @param path string
-- @return string|nil 16 hexadecimal digits, string|nil message, string|nil code
function M.hash(path)
  local box, hash = ffi.new "wane_job *[1]", ffi.new "uint64_t[1]"
  core.check(C.wane_hash_file(box, path))
  local job = ffi.gc(box[0], C.wane_job_free)
  local status = core.wait_job(job)
  if status == 0 then status = C.wane_hash_take(job, hash) end
  if status < 0 then return core.failure(status) end
  return M.hex(hash[0])
end

-- ---------------------------------------------------------------- links

local function is_below(path, folder) return path:sub(1, #folder + 1) == folder .. "/" end

--- Does a file of a model's folder, links followed, belong to it? A downloaded folder may hold symbolic links. They are followed where
-- people and tools put them: to other files of the folder and to its neighbours (the folder's parent and what is below it), and from
-- snapshots/<revision> of the Hugging Face cache to the blobs of the same repository. A link that leads anywhere else would make wane
-- read a file that the folder has no business with.
-- @param folder string
-- @param path string a file in it; one that is not there passes: opening it says so better
-- @return true|nil, string|nil message, string|nil code
function M.check(folder, path)
  local home, target = M.real(folder), M.real(path)
  if not home or not target or home == "/" or is_below(target, home) then return true end
  local parent = home:match "^(.+)/[^/]*$"              -- nil in the root: everything would be a neighbour there
  if parent and is_below(target, parent) then return true end
  local repository = parent and parent:match "^(.+)/snapshots$"
  if repository and is_below(target, repository .. "/blobs") then return true end
  return nil, ("'%s' is a symbolic link to '%s', outside of the model's folder: copy the file there if it belongs to the model"):format(path, target),
    "WANE_E_FORMAT"
end

return M
