-- A hub for spec/hub: serves one folder as any repository, and misbehaves as the repository's name asks.
--
--   luajit spec/support/hub_server.lua FOLDER LOG       prints its process id and port, then serves until it is killed
--
-- drops        closes the connection after 1000 bytes of a body, whatever was promised     short      promises more than it sends
-- long         sends more than the list says                  wrong      other bytes of the same length
-- noresume     ignores Range                                  busy       503 with Retry-After, once a file
-- elsewhere    redirects bodies to another host name          circle     redirects to itself
-- denied 401 · gone 404 · silent: never answers · evil: lists "../escape" · nosums: lists no checksums · garbage: no JSON
local uv = require "luv"
local cjson = require "cjson"
package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
local digest = require "wane.hub.digest"

local folder, log_path = arg[1], arg[2]
local log = assert(io.open(log_path, "a"))
log:setvbuf "no"
local COMMIT = ("0123456789abcdef"):rep(2) .. "01234567"
local port
local seen = {}                                          -- how often a URL was asked for

local function read(path)
  local f = io.open(folder .. "/" .. path, "rb")
  if not f then return nil end
  local text = f:read "*a"
  f:close()
  return text
end

local function listing(kind)
  local siblings = {}
  for path in io.popen("cd '" .. folder .. "' && find . -type f | sort"):lines() do
    path = path:sub(3)
    local size = #read(path)
    local large = path:find "%.safetensors$"
    local entry = { rfilename = path, size = size, blobId = digest.of_file(folder .. "/" .. path, ("0"):rep(40), size) }
    if large then entry.lfs = { size = size, sha256 = digest.of_file(folder .. "/" .. path, ("0"):rep(64), size) } end
    if kind == "nosums" then entry.blobId, entry.lfs = nil, nil end
    siblings[#siblings + 1] = entry
  end
  if kind == "evil" then siblings[#siblings + 1] = { rfilename = "../escape", size = 1, blobId = ("a"):rep(40) } end
  return cjson.encode { sha = COMMIT, siblings = siblings }
end

-- status, headers, body, and how many bytes of it are sent before the connection closes.
local function answer(kind, path, range, url)
  local body = read(path)
  if not body or kind == "gone" then return "404 Not Found", "", "no" end
  if kind == "denied" then return "401 Unauthorized", "", "no" end
  if kind == "busy" and seen[url] == 1 then return "503 Service Unavailable", "Retry-After: 1\r\n", "" end
  if kind == "circle" then return "302 Found", "Location: " .. url .. "\r\n", "" end
  if kind == "elsewhere" and not url:find "^/storage" then
    return "302 Found", ("Location: http://localhost:%d/storage%s\r\n"):format(port, url), ""
  end
  if kind == "wrong" then body = ("x"):rep(#body) end
  if kind == "long" then body = body .. "and more" end
  local status, headers = "200 OK", ""
  if range and kind ~= "noresume" then
    status, headers = "206 Partial Content", ("Content-Range: bytes %d-%d/%d\r\n"):format(range, #body - 1, #body)
    body = body:sub(range + 1)
  end
  local sent = #body
  if kind == "drops" or (kind == "noresume" and seen[url] == 1) then sent = math.min(sent, 1000) end
  if kind == "short" then sent = math.floor(sent / 2) end
  return status, headers, body, sent
end

local function serve(client, request)
  local url = request:match "^GET (%S+)"
  local auth = request:match "[Aa]uthorization: ([^\r\n]+)"
  local range = tonumber(request:match "[Rr]ange: bytes=(%d+)%-")
  log:write(("%s range=%s auth=%s host=%s\n"):format(url, tostring(range), tostring(auth), request:match "[Hh]ost: ([^\r\n:]+)"))
  seen[url] = (seen[url] or 0) + 1
  local kind = url:match "/test/(%w+)"
  if kind == "silent" then return end
  local status, headers, body, sent
  if url:find "^/api/" then
    status, headers, body = "200 OK", "", kind == "garbage" and "<html>" or listing(kind)
    if kind == "denied" then status, body = "401 Unauthorized", "{}" elseif kind == "gone" then status, body = "404 Not Found", "{}" end
  else
    local path = url:match("/resolve/[^/]+/(.*)$"):gsub("%%(%x%x)", function(h) return string.char(tonumber(h, 16)) end)
    status, headers, body, sent = answer(kind, path, range, url)
  end
  local head = ("HTTP/1.1 %s\r\n%sContent-Length: %d\r\nConnection: close\r\n\r\n"):format(status, headers, #body)
  client:write(head .. body:sub(1, sent or #body), function() client:shutdown(function() if not client:is_closing() then client:close() end end) end)
end

local server = uv.new_tcp()
server:bind("127.0.0.1", 0)
server:listen(16, function()
  local client, text = uv.new_tcp(), ""
  server:accept(client)
  client:read_start(function(err, data)
    if err or not data then
      if not client:is_closing() then client:close() end
      return
    end
    text = text .. data
    if text:find "\r\n\r\n" then
      serve(client, text)
      text = ""
    end
  end)
end)
port = server:getsockname().port
io.stdout:write(uv.os_getpid(), " ", port, "\n")
io.stdout:flush()
uv.run()
