--- Downloads over HTTP by libcurl, one at a time: into a file, resumed where it stopped, or into memory. libcurl's multi interface does
-- the work, so nothing here calls back into Lua, and between its steps the caller is asked whether to go on.
-- @module wane.hub.http
local ffi = require "ffi"

local M = {}

-- Own names for the C functions: a host may have declared them already, perhaps otherwise.
ffi.cdef [[
typedef struct wane_curl_message { int message; void *easy; union { void *whatever; int result; } data; } wane_curl_message;
void *wane_curl_easy_init(void) asm("curl_easy_init");
void wane_curl_easy_cleanup(void *) asm("curl_easy_cleanup");
int wane_curl_easy_setopt(void *, int, ...) asm("curl_easy_setopt");
int wane_curl_easy_getinfo(void *, int, ...) asm("curl_easy_getinfo");
const char *wane_curl_easy_strerror(int) asm("curl_easy_strerror");
void *wane_curl_multi_init(void) asm("curl_multi_init");
int wane_curl_multi_cleanup(void *) asm("curl_multi_cleanup");
int wane_curl_multi_add_handle(void *, void *) asm("curl_multi_add_handle");
int wane_curl_multi_remove_handle(void *, void *) asm("curl_multi_remove_handle");
int wane_curl_multi_perform(void *, int *) asm("curl_multi_perform");
int wane_curl_multi_poll(void *, void *, unsigned, int, int *) asm("curl_multi_poll");
wane_curl_message *wane_curl_multi_info_read(void *, int *) asm("curl_multi_info_read");
void *wane_fopen(const char *, const char *) asm("fopen");
void *wane_open_memstream(char **, size_t *) asm("open_memstream");
int wane_fclose(void *) asm("fclose");
void wane_libc_free(void *) asm("free");
int wane_poll(void *, unsigned long, int) asm("poll");
]]

-- curl/curl.h; numbers of a released option never change.
local OPT = { WRITEDATA = 10001, URL = 10002, ERRORBUFFER = 10010, USERAGENT = 10018, CAINFO = 10065, XOAUTH2_BEARER = 10220,
              PROTOCOLS_STR = 10318, REDIR_PROTOCOLS_STR = 10319, LOW_SPEED_LIMIT = 19, LOW_SPEED_TIME = 20, FAILONERROR = 45, FOLLOWLOCATION = 52,
              MAXREDIRS = 68, CONNECTTIMEOUT = 78, NOSIGNAL = 99, HTTPAUTH = 107, RESUME_FROM_LARGE = 30116 }
local INFO = { RESPONSE_CODE = 0x200002, SIZE_DOWNLOAD = 0x600008, RETRY_AFTER = 0x600039 }
local BEARER = 64
local E = { COULDNT_RESOLVE_HOST = 6, WRITE_ERROR = 23, RANGE_ERROR = 33, HTTP_RETURNED_ERROR = 22,
            TOO_MANY_REDIRECTS = 47, UNSUPPORTED_PROTOCOL = 1, URL_MALFORMAT = 3, PEER_FAILED_VERIFICATION = 60 }

local library
local function curl()
  if library then return library end
  for _, name in ipairs { "libcurl.so.4", "curl", "libcurl-gnutls.so.4" } do
    local ok, found = pcall(ffi.load, name)
    if ok then
      library = found
      return found
    end
  end
  return nil, "libcurl is not installed: apt-get install libcurl4"
end

-- Errors that another try may mend; the others say something about the request.
local lasting = { [E.UNSUPPORTED_PROTOCOL] = true, [E.URL_MALFORMAT] = true, [E.WRITE_ERROR] = true, [E.TOO_MANY_REDIRECTS] = true,
                  [E.PEER_FAILED_VERIFICATION] = true, [E.COULDNT_RESOLVE_HOST] = true }

local function set_long(c, easy, option, value) c.wane_curl_easy_setopt(easy, option, ffi.cast("long", value)) end
local function set_text(c, easy, option, value) c.wane_curl_easy_setopt(easy, option, ffi.cast("const char *", value)) end

local function prepare(c, easy, url, o, stream, errors)
  set_text(c, easy, OPT.URL, url)
  c.wane_curl_easy_setopt(easy, OPT.WRITEDATA, ffi.cast("void *", stream))
  c.wane_curl_easy_setopt(easy, OPT.ERRORBUFFER, ffi.cast("char *", errors))
  set_text(c, easy, OPT.USERAGENT, "wane/" .. require("wane").version)
  set_text(c, easy, OPT.PROTOCOLS_STR, "http,https")
  -- From https a redirect may not lead to plain http: the body's checksum would still hold, but who asks for what would be public.
  set_text(c, easy, OPT.REDIR_PROTOCOLS_STR, url:find "^https:" and "https" or "http,https")
  set_long(c, easy, OPT.FOLLOWLOCATION, 1)
  set_long(c, easy, OPT.MAXREDIRS, 5)
  set_long(c, easy, OPT.FAILONERROR, 1)
  set_long(c, easy, OPT.NOSIGNAL, 1)
  set_long(c, easy, OPT.CONNECTTIMEOUT, 30)
  set_long(c, easy, OPT.LOW_SPEED_LIMIT, 1)              -- a connection that says nothing for this long is dead
  set_long(c, easy, OPT.LOW_SPEED_TIME, o.silence or 60)
  local authorities = os.getenv "CURL_CA_BUNDLE" or os.getenv "SSL_CERT_FILE"
  if authorities then set_text(c, easy, OPT.CAINFO, authorities) end
  if o.token then                                        -- curl keeps it from other hosts when it follows a redirect
    set_long(c, easy, OPT.HTTPAUTH, BEARER)
    set_text(c, easy, OPT.XOAUTH2_BEARER, o.token)
  end
  if (o.from or 0) > 0 then c.wane_curl_easy_setopt(easy, OPT.RESUME_FROM_LARGE, ffi.cast("int64_t", o.from)) end
end

local function number_of(c, easy, info, ctype)
  local box = ffi.new(ctype .. "[1]")
  c.wane_curl_easy_getinfo(easy, info, box)
  return tonumber(box[0])
end

-- Runs a prepared transfer. Returns curl's code, or nil when the caller broke it off.
local function transfer(c, easy, o)
  local multi = ffi.gc(c.wane_curl_multi_init(), c.wane_curl_multi_cleanup)
  local running, left = ffi.new "int[1]", ffi.new "int[1]"
  c.wane_curl_multi_add_handle(multi, easy)
  local result
  repeat
    c.wane_curl_multi_perform(multi, running)
    local bytes = number_of(c, easy, INFO.SIZE_DOWNLOAD, "int64_t")
    if o.progress then o.progress((o.from or 0) + bytes) end
    if o.cancelled and o.cancelled() then break end
    if o.limit and bytes > o.limit then break end
    if running[0] > 0 then c.wane_curl_multi_poll(multi, nil, 0, 100, left) end
  until running[0] == 0
  local message = c.wane_curl_multi_info_read(multi, left)
  if message ~= nil then result = message.data.result end
  c.wane_curl_multi_remove_handle(multi, easy)
  c.wane_curl_multi_cleanup(ffi.gc(multi, nil))
  return result
end

-- The outcome of a transfer as { status, bytes } or nil, message, kind.
local function outcome(c, easy, result, url, errors, o)
  local status = number_of(c, easy, INFO.RESPONSE_CODE, "long")
  local bytes = number_of(c, easy, INFO.SIZE_DOWNLOAD, "int64_t")
  if result == nil then
    if o.cancelled and o.cancelled() then return nil, "cancelled", "cancelled" end
    return nil, ("'%s' sends more than %d bytes"):format(url, o.limit), "length"
  end
  if result == 0 then return { status = status, bytes = bytes } end
  if result == E.HTTP_RETURNED_ERROR then
    local kind = (status >= 500 or status == 429 or status == 408) and "again" or "status"
    return nil, ("'%s' answered with HTTP status %d"):format(url, status), kind, status, number_of(c, easy, INFO.RETRY_AFTER, "int64_t")
  end
  local text = errors[0] ~= 0 and ffi.string(errors) or ffi.string(c.wane_curl_easy_strerror(result))
  local kind = result == E.RANGE_ERROR and "range" or lasting[result] and "lasting" or "again"
  return nil, ("'%s': %s"):format(url, text), kind, status
end

--- Fetches a URL once.
-- @param url string http or https; redirects are followed (from https to https alone)
-- @param o table { path = file that the body is written to (appended, from `from` on) or nil for memory, from = bytes that are there already,
--   token = bearer token or nil, limit = most bytes, silence = seconds without a byte that end it (60), progress = function(bytes),
--   cancelled = function() -> boolean }
-- @return table|nil { status, bytes, body (memory) }, string|nil message, string|nil kind: "again" (worth another try), "range" (the server
--   cannot resume), "status", "lasting", "length" or "cancelled", integer|nil HTTP status, integer|nil seconds to wait as the server asks
function M.get(url, o)
  local c, missing = curl()
  if not c then return nil, missing, "lasting" end
  local text, size = ffi.new "char *[1]", ffi.new "size_t[1]"
  local stream = o.path and ffi.C.wane_fopen(o.path, (o.from or 0) > 0 and "ab" or "wb") or not o.path and ffi.C.wane_open_memstream(text, size)
  if not stream or stream == nil then return nil, ("cannot write '%s'"):format(o.path or "a buffer"), "lasting" end
  local easy, errors = c.wane_curl_easy_init(), ffi.new "char[256]"
  prepare(c, easy, url, o, stream, errors)
  local ok, result = pcall(transfer, c, easy, o)
  local answer, message, kind, status, wait
  if ok then answer, message, kind, status, wait = outcome(c, easy, result, url, errors, o) end
  c.wane_curl_easy_cleanup(easy)
  local closed = ffi.C.wane_fclose(stream)
  if not o.path and text[0] ~= nil then
    if answer then answer.body = ffi.string(text[0], size[0]) end
    ffi.C.wane_libc_free(text[0])
  end
  if not ok then error(result, 0) end
  if answer and closed ~= 0 then return nil, ("cannot write '%s': is the disk full?"):format(o.path), "lasting" end
  return answer, message, kind, status, wait
end

--- Sleeps.
-- @param seconds number
function M.sleep(seconds) ffi.C.wane_poll(nil, 0, seconds * 1000) end

return M
