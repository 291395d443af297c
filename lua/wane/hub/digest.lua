--- Checksums of files by OpenSSL's libcrypto, which libcurl brings with it.
-- @module wane.hub.digest
local ffi = require "ffi"

local M = {}

ffi.cdef [[
void *wane_md_new(void) asm("EVP_MD_CTX_new");
void wane_md_free(void *) asm("EVP_MD_CTX_free");
const void *wane_md_sha256(void) asm("EVP_sha256");
const void *wane_md_sha1(void) asm("EVP_sha1");
int wane_md_init(void *, const void *, void *) asm("EVP_DigestInit_ex");
int wane_md_update(void *, const void *, size_t) asm("EVP_DigestUpdate");
int wane_md_final(void *, unsigned char *, unsigned *) asm("EVP_DigestFinal_ex");
]]

local PIECE = 1024 * 1024
local library

local function crypto()
  for _, name in ipairs { "libcrypto.so.3", "crypto", "libcrypto.so.1.1" } do
    if library then break end
    local ok, found = pcall(ffi.load, name)
    if ok then library = found end
  end
  return library
end

--- The checksum that a Hugging Face hub calls a file's etag: SHA-256 of large (LFS) files, git's blob id (SHA-1 over "blob <size>\0" and the
-- bytes) of the others; which it is shows in its length, 64 or 40 hexadecimal digits.
-- @param path string
-- @param etag string what the hub says; its length picks the kind
-- @param bytes integer the file's size
-- @return string|nil hexadecimal, string|nil message
function M.of_file(path, etag, bytes)
  local c = crypto()
  if not c then return nil, "libcrypto is not installed: apt-get install libssl3" end
  local file, message = io.open(path, "rb")
  if not file then return nil, message end
  local context = ffi.gc(c.wane_md_new(), c.wane_md_free)
  c.wane_md_init(context, #etag == 64 and c.wane_md_sha256() or c.wane_md_sha1(), nil)
  if #etag ~= 64 then
    local head = ("blob %d\0"):format(bytes)
    c.wane_md_update(context, head, #head)
  end
  while true do
    local piece = file:read(PIECE)
    if not piece then break end
    c.wane_md_update(context, piece, #piece)
  end
  file:close()
  local out, size = ffi.new "unsigned char[64]", ffi.new "unsigned[1]"
  c.wane_md_final(context, out, size)
  local hex = {}
  for i = 0, size[0] - 1 do hex[i + 1] = ("%02x"):format(out[i]) end
  return table.concat(hex)
end

return M
