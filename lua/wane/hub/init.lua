--- Models by name: "org/name" in the local Hugging Face cache, without network, and `pull`, which fills that same cache.
--
-- The cache is huggingface_hub's own, so that what transformers fetched is found here and the other way round:
--
--     models--org--name/refs/main                       the commit that a revision stands for
--     models--org--name/snapshots/COMMIT/config.json    a link to ../../blobs/ETAG
--     models--org--name/blobs/ETAG                      the bytes; ETAG.incomplete while they arrive
--
-- Source: huggingface_hub file_download.py, constants.py.
-- @module wane.hub
local ffi = require "ffi"
local core = require "wane.core"
local json = require "wane.checkpoint.json"
local C = core.C

local M = {}

ffi.cdef [[
int wane_libc_symlink(const char *, const char *) asm("symlink");
int wane_libc_open(const char *, int, ...) asm("open");
int wane_libc_close(int) asm("close");
int wane_libc_flock(int, int) asm("flock");
]]

local ATTEMPTS = 5
local LISTING = 64 * 1024 * 1024                       -- most bytes of a repository's list of files

-- ---------------------------------------------------------------- names and places

--- "org/name@revision" in parts; nil for what cannot be a repository's name.
-- @param text string
-- @return string|nil name, string|nil revision
function M.parse(text)
  local name, revision = text:match "^([^@]+)@(.+)$"
  name = name or text
  local valid = (name:find "^%w[%w._-]*/%w[%w._-]*$" or name:find "^%w[%w._-]*$") and not name:find("..", 1, true) and not name:find("--", 1, true)
  if not valid or (revision and (revision:find("..", 1, true) or not revision:find "^[%w._/-]+$" or revision:find "^/")) then return nil end
  return name, revision
end

local function home() return os.getenv "HF_HOME" or (os.getenv "XDG_CACHE_HOME" or (os.getenv "HOME" or ".") .. "/.cache") .. "/huggingface" end

--- The cache's folder: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub.
-- @return string
function M.cache() return os.getenv "HF_HUB_CACHE" or os.getenv "HUGGINGFACE_HUB_CACHE" or home() .. "/hub" end

local function folder_of(name) return M.cache() .. "/models--" .. name:gsub("/", "--") end

local function read_text(path)
  local file = io.open(path, "rb")
  local text = file and file:read(4096)
  if file then file:close() end
  return text
end

local function trimmed(text) return text and text:match "^%s*(.-)%s*$" end

--- The snapshot folder of a model that is in the cache.
-- @param text string "org/name" or "org/name@revision" (a branch, a tag or a commit; main)
-- @return string|nil folder, string|nil message, string|nil code
function M.find(text)
  local name, revision = M.parse(text)
  if not name then return nil, ("'%s' is no model's name: expected org/name or org/name@revision"):format(text), "WANE_E_ARG" end
  revision = revision or "main"
  local folder = folder_of(name)
  local commit = trimmed(read_text(folder .. "/refs/" .. revision)) or revision
  local snapshot = folder .. "/snapshots/" .. commit
  if commit:find "^[%w._-]+$" and C.wane_path_kind(snapshot) == C.WANE_PATH_FOLDER then return snapshot end
  return nil, ("'%s' is no path here, and the model is not in the cache %s%s: `wane pull %s` fetches it"):format(text, M.cache(),
    C.wane_path_kind(folder) == C.WANE_PATH_FOLDER and " in that revision" or "", text), "WANE_E_NOTFOUND"
end

local file_endings = { gguf = true, safetensors = true, json = true, bin = true, pt = true, txt = true }

--- What users call a model, as a path: a path that exists is itself; else a name is looked up in the cache.
-- @param text string
-- @return string|nil path, string|nil message, string|nil code
function M.resolve(text)
  local is_file = file_endings[text:match "%.(%w+)$"]
  if is_file or not M.parse(text) or C.wane_path_kind(text) ~= C.WANE_PATH_NONE then return text end
  return M.find(text)
end

-- ---------------------------------------------------------------- which files

-- A shell pattern as a Lua one: * and ? match any characters, "/" included, as huggingface_hub's do.
local function matches(path, pattern)
  local lua = pattern:gsub("[%^%$%(%)%%%.%[%]%+%-]", "%%%0"):gsub("%*", ".*"):gsub("%?", ".")
  return path:find("^" .. lua .. "$") ~= nil
end

-- What no version of wane reads: other frameworks' weights, exports, pictures.
local useless = { "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data", "*.tflite", "*.mlmodel", "*.pb", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg",
                  "*.mp4", ".git*", "*/.git*", "original/*", "onnx/*", "openvino/*", "coreml/*", "runs/*", "*.pt", "*.pth", "*.ckpt",
                  "optimizer*", "training_args.bin", "*.zip", "*.tar.gz" }

local function any(path, patterns)
  for _, pattern in ipairs(patterns) do if matches(path, pattern) then return true end end
  return false
end

--- The files of a repository that are worth fetching: those that `include` names, else all that wane reads; of weights in several
-- formats, safetensors.
-- @param files table[] { path, … }
-- @param include string[]|nil shell patterns
-- @return table[]
function M.choose(files, include)
  local list, safe = {}, false
  for _, f in ipairs(files) do safe = safe or matches(f.path, "*.safetensors") end
  for _, f in ipairs(files) do
    local wanted
    if include and #include > 0 then wanted = any(f.path, include)
    else wanted = not any(f.path, useless) and not (safe and (matches(f.path, "*.bin") or matches(f.path, "*.bin.index.json") or matches(f.path, "*.gguf"))) end
    if wanted then list[#list + 1] = f end
  end
  return list
end

-- ---------------------------------------------------------------- the hub

local function endpoint() return (os.getenv "HF_ENDPOINT" or "https://huggingface.co"):gsub("/+$", "") end

--- The token in use: HF_TOKEN, else the file that `hf auth login` leaves.
-- @return string|nil
function M.token()
  local token = os.getenv "HF_TOKEN" or os.getenv "HUGGING_FACE_HUB_TOKEN" or read_text(os.getenv "HF_TOKEN_PATH" or home() .. "/token")
  token = trimmed(token)
  return token ~= "" and token or nil
end

local function escaped(path) return (path:gsub("[^%w%-%._~/]", function(ch) return ("%%%02X"):format(ch:byte()) end)) end

local function refusal(name, status)
  if status == 401 or status == 403 then
    return ("'%s' cannot be read with %s: set HF_TOKEN to a token that may (and accept the model's terms on its page)"):format(name,
      M.token() and "the token in use" or "no token")
  elseif status == 404 then return ("'%s' does not exist there, or not in that revision (private models need HF_TOKEN)"):format(name) end
end

-- Waits between two tries; ctrl-C ends it.
local function pause(seconds, o)
  local stop = C.wane_clock() + seconds
  while C.wane_clock() < stop and not (o.cancelled and o.cancelled()) do
    require("wane.hub.http").sleep(0.1)
  end
end

-- fn(attempt) until it succeeds, says that another try is useless, or has had its tries.
local function persistently(o, fn)
  local answer, message, kind, status, wait
  for attempt = 1, ATTEMPTS do
    answer, message, kind, status, wait = fn(attempt)
    if answer or (kind ~= "again" and kind ~= "range" and kind ~= "content") then break end
    if attempt < ATTEMPTS then
      if o.retrying then o.retrying(message, attempt, ATTEMPTS) end
      pause(math.min(wait and wait > 0 and wait or (o.patience or 1) * 2 ^ (attempt - 1), 30), o)
    end
    if o.cancelled and o.cancelled() then return nil, "cancelled", "cancelled" end
  end
  return answer, message, kind, status
end

-- A path of the hub's list must stay inside the snapshot.
local function safe_path(path)
  if type(path) ~= "string" or path == "" or #path > 1024 or path:find "^/" or path:find "[%z\1-\31\\]" then return false end
  for part in (path .. "/"):gmatch "(.-)/" do if part == "" or part == "." or part == ".." then return false end end
  return true
end

local function valid_etag(etag) return type(etag) == "string" and etag:find "^%x+$" and (#etag == 40 or #etag == 64) end

--- A repository's commit and files, as its hub lists them.
-- @param name string org/name
-- @param revision string
-- @param o table as pull's
-- @return table|nil { commit, files = { { path, bytes, etag } } }, string|nil message, string|nil code
function M.list(name, revision, o)
  local http = require "wane.hub.http"
  local url = ("%s/api/models/%s/revision/%s?blobs=true"):format(endpoint(), escaped(name), (escaped(revision):gsub("/", "%%2F")))
  local answer, message, kind, status = persistently(o, function()
    return http.get(url, { token = M.token(), limit = LISTING, cancelled = o.cancelled, silence = o.silence })
  end)
  if not answer then return nil, refusal(name, status) or message, kind == "cancelled" and "WANE_E_CANCELLED" or "WANE_E_IO" end
  local value, reason = json.decode(answer.body)
  if not value or type(value.siblings) ~= "table" or not (type(value.sha) == "string" and value.sha:find "^%x+$") then
    return nil, ("'%s' did not answer with a repository's list of files%s"):format(url, reason and ": " .. reason or ""), "WANE_E_FORMAT"
  end
  local files = {}
  for _, s in ipairs(value.siblings) do
    local lfs = type(s) == "table" and type(s.lfs) == "table" and s.lfs or {}
    local f = type(s) == "table" and { path = s.rfilename, bytes = lfs.size or s.size, etag = lfs.sha256 or s.blobId }
    if not f or not safe_path(f.path) then
      return nil, ("'%s' lists a file that would leave the model's folder: '%s'"):format(url, tostring(f and f.path)), "WANE_E_FORMAT"
    end
    if not valid_etag(f.etag) or type(f.bytes) ~= "number" or f.bytes < 0 then
      return nil, ("'%s' does not say size and checksum of '%s'"):format(url, f.path), "WANE_E_FORMAT"
    end
    files[#files + 1] = f
  end
  return { commit = value.sha, files = files }
end

-- ---------------------------------------------------------------- one file

local bytes_box = ffi.new "uint64_t[1]"
local function size_of(path)
  if C.wane_path_kind(path) ~= C.WANE_PATH_FILE or C.wane_path_stat(path, bytes_box, nil) < 0 then return nil end
  return tonumber(bytes_box[0])
end

local TOO_LONG = "'%s' sends more than the %d bytes that its hub promised"

-- One try at the rest of a blob; checks what arrived.
local function fetch_once(url, part, f, o)
  local http = require "wane.hub.http"
  local from = size_of(part) or 0
  if from > f.bytes then
    os.remove(part)
    from = 0
  end
  if from < f.bytes or f.bytes == 0 then
    local answer, message, kind, status, wait = http.get(url, {
      path = part, from = from, token = M.token(), silence = o.silence, cancelled = o.cancelled,
      limit = f.bytes - from, progress = o.progress and function(bytes) o.progress(f.path, bytes, f.bytes) end,
    })
    if not answer then
      if kind == "range" or status == 416 or kind == "length" then os.remove(part) end
      if kind == "length" then return nil, TOO_LONG:format(url, f.bytes), "content" end
      return nil, message, status == 416 and "again" or kind, status, wait
    end
  end
  local arrived = size_of(part) or 0
  if arrived > f.bytes then
    os.remove(part)
    return nil, TOO_LONG:format(url, f.bytes), "content"
  elseif arrived < f.bytes then
    return nil, ("'%s' ended after %d of %d bytes"):format(url, arrived, f.bytes), "again"
  end
  local sum, message = require("wane.hub.digest").of_file(part, f.etag, f.bytes)
  if not sum then return nil, message, "lasting" end
  if sum ~= f.etag then
    os.remove(part)
    return nil, ("'%s' does not have the checksum that its hub promised: found %s, expected %s"):format(url, sum, f.etag), "content"
  end
  return true
end

local LOCK_EX, LOCK_NB, O_RDWR, O_CREAT = 2, 4, 2, 64

-- Holds huggingface_hub's own lock of a blob while fn runs: two programs may fetch the same file at once.
local function with_lock(path, o, fn)
  C.wane_path_make(path:match "^(.*)/")
  local fd = ffi.C.wane_libc_open(path, O_RDWR + O_CREAT, ffi.cast("int", 420))          -- 0644
  if fd < 0 then return nil, ("cannot write '%s'"):format(path), "lasting" end
  while ffi.C.wane_libc_flock(fd, LOCK_EX + LOCK_NB) ~= 0 do
    if o.cancelled and o.cancelled() then
      ffi.C.wane_libc_close(fd)
      return nil, "cancelled", "cancelled"
    end
    pause(0.1, o)
  end
  local function finish(ok, ...)
    ffi.C.wane_libc_close(fd)
    if not ok then error((...), 0) end
    return ...
  end
  return finish(pcall(fn))
end

-- Fetches a file's blob, unless it is there.
local function fetch_blob(name, commit, f, o)
  local folder = folder_of(name)
  local blob = folder .. "/blobs/" .. f.etag
  if size_of(blob) == f.bytes then return true end
  local lock = ("%s/.locks/models--%s/%s.lock"):format(M.cache(), (name:gsub("/", "--")), f.etag)
  return with_lock(lock, o, function()
    if size_of(blob) == f.bytes then return true end
    local part = blob .. ".incomplete"
    local url = ("%s/%s/resolve/%s/%s"):format(endpoint(), name, commit, escaped(f.path))
    local ok, message, kind, status = persistently(o, function() return fetch_once(url, part, f, o) end)
    if not ok then return nil, message, kind, status end
    local renamed, reason = os.rename(part, blob)
    if not renamed then return nil, reason, "lasting" end
    return true
  end)
end

-- The snapshot's link to a blob: relative, as upstream makes it.
local function link(name, commit, f)
  local path = ("%s/snapshots/%s/%s"):format(folder_of(name), commit, f.path)
  local _, depth = f.path:gsub("/", "")
  local status = C.wane_path_make(path:match "^(.*)/")
  if status < 0 then return core.failure(status) end
  os.remove(path)
  local target = ("../"):rep(depth + 2) .. "blobs/" .. f.etag
  if ffi.C.wane_libc_symlink(target, path) ~= 0 then return nil, ("cannot make the link '%s'"):format(path), "WANE_E_IO" end
  return true
end

-- ---------------------------------------------------------------- pull

--- Fetches a model into the cache. What is there already is not fetched again; what was broken off goes on where it stopped; every file's
-- size and checksum are verified before it counts. Blocks the calling thread: it is a command's, not
-- a host's; `cancelled` is asked ten times a second.
-- @param text string org/name or org/name@revision (main)
-- @param o table|nil { include = shell patterns of files, progress = function(path, bytes, of_bytes), file = function(path, i, count, bytes),
--   retrying = function(message, attempt, attempts), cancelled = function() -> boolean, patience = seconds before the second try (1; doubled
--   each time), silence = seconds without a byte that end a connection (60) }
-- @return string|nil folder of the snapshot, string|nil message, string|nil code
function M.pull(text, o)
  o = o or {}
  local name, revision = M.parse(text)
  if not name then return nil, ("'%s' is no model's name: expected org/name or org/name@revision"):format(text), "WANE_E_ARG" end
  if os.getenv "HF_HUB_OFFLINE" == "1" then return nil, "HF_HUB_OFFLINE=1 forbids the network: unset it to pull", "WANE_E_ARG" end
  revision = revision or "main"
  local repository, message, code = M.list(name, revision, o)
  if not repository then return nil, message, code end
  local files = M.choose(repository.files, o.include)
  if #files == 0 then
    return nil, o.include and ("no file of '%s' matches %s"):format(name, table.concat(o.include, ", ")) or ("'%s' holds no file that wane reads"):format(name),
      "WANE_E_NOTFOUND"
  end
  local folder = folder_of(name)
  for _, path in ipairs { folder .. "/blobs", folder .. "/snapshots/" .. repository.commit, (folder .. "/refs/" .. revision):match "^(.*)/" } do
    local status = C.wane_path_make(path)
    if status < 0 then return core.failure(status) end
  end
  for i, f in ipairs(files) do
    if o.file then o.file(f.path, i, #files, f.bytes) end
    local ok, kind, status
    ok, message, kind, status = fetch_blob(name, repository.commit, f, o)
    if not ok then return nil, refusal(name, status) or message, kind == "cancelled" and "WANE_E_CANCELLED" or "WANE_E_IO" end
    ok, message, code = link(name, repository.commit, f)
    if not ok then return nil, message, code end
  end
  if revision ~= repository.commit then                    -- last: a revision never points at a snapshot that is not whole
    local ref = io.open(folder .. "/refs/" .. revision, "wb")
    if not ref then return nil, ("cannot write '%s/refs/%s'"):format(folder, revision), "WANE_E_IO" end
    ref:write(repository.commit)
    ref:close()
  end
  return ("%s/snapshots/%s"):format(folder, repository.commit)
end

return M
