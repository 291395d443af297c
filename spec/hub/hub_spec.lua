-- Models by name and `wane pull`, against a server of this suite that misbehaves on request (spec/support/hub_server.lua).
local ffi = require "ffi"
local cjson = require "cjson"
local files = require "spec.support.files"
local hub = require "wane.hub"
local wane = require "wane"

ffi.cdef "int setenv(const char *, const char *, int); int unsetenv(const char *); int kill(int, int);"

local program = os.getenv "WANE_BIN" or "bin/wane"
local COMMIT = ("0123456789abcdef"):rep(2) .. "01234567"
local source = "spec/fixtures/models/llama"
local served, cache, log, pid, pipe          -- the pipe is held: collecting it would wait for the server
local variables = { "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY" }
local saved = {}

local function set(name, value) if value then ffi.C.setenv(name, value, 1) else ffi.C.unsetenv(name) end end

local function requests()
  local list = {}
  for line in io.lines(log) do list[#list + 1] = line end
  return list
end

-- A pull without patience, and the messages of the tries that failed.
local function pull(name, o)
  o = o or {}
  local tries = {}
  o.patience, o.silence = 0.01, 1
  o.retrying = function(message) tries[#tries + 1] = message end
  local path, message, code = hub.pull(name, o)
  return path, message, code, tries
end

local function same(path, name) return files.read(path .. "/" .. name) == files.read(served .. "/" .. name) end

setup(function()
  for _, name in ipairs(variables) do saved[name] = os.getenv(name) or false end
  served, log = files.folder(), files.folder() .. "/log"
  assert(os.execute(("cp %s/config.json %s/model.safetensors %s && mkdir '%s/with space' && echo '{}' > '%s/with space/a+b.json' && echo x > %s/a.onnx")
    :format(source, source, served, served, served, served)) == 0)
  pipe = io.popen(("exec luajit spec/support/hub_server.lua %s %s"):format(served, log))
  local port
  pid, port = pipe:read("*l"):match "^(%d+) (%d+)$"
  set("HF_ENDPOINT", "http://127.0.0.1:" .. port)
  for _, name in ipairs { "HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY" } do set(name, nil) end
end)

teardown(function()
  if pid then ffi.C.kill(tonumber(pid), 15) end
  if pipe then pipe:close() end
  for name, value in pairs(saved) do set(name, value or nil) end
  files.clean()
end)

before_each(function()
  cache = files.folder()
  set("HF_HUB_CACHE", cache)
  files.write(log, "")
end)

describe("names", function()
  it("are parsed, and nothing that could leave the cache is one", function()
    assert.same({ "org/name", nil }, { hub.parse "org/name" })
    assert.same({ "gpt2", nil }, { hub.parse "gpt2" })
    assert.same({ "org/na.me-1_2", "refs/pr/1" }, { hub.parse "org/na.me-1_2@refs/pr/1" })
    for _, bad in ipairs { "", "/abs", "../up", "a/../b", "a/b/c", "a/b@../x", "a/b@/x", "a--b/c", "a b/c", "~/x" } do
      assert.is_nil((hub.parse(bad)), bad)
    end
  end)

  it("are found in a cache that huggingface_hub's layout says", function()
    local folder = cache .. "/models--org--tiny"
    assert(os.execute(("mkdir -p %s/refs %s/snapshots/%s && printf %s > %s/refs/main && cp %s/* %s/snapshots/%s/"):format(
      folder, folder, COMMIT, COMMIT, folder, source, folder, COMMIT)) == 0)
    assert.equal(folder .. "/snapshots/" .. COMMIT, hub.find "org/tiny")
    assert.equal(folder .. "/snapshots/" .. COMMIT, hub.find("org/tiny@" .. COMMIT))
    local model = assert(wane.load("org/tiny", { tokenizer = false }))
    assert.equal("llama", model.family.name)
    model:close()
  end)

  it("that are not there are refused with the command that fetches them", function()
    local found, message, code = wane.load "org/nothing"
    assert.is_nil(found)
    assert.equal("WANE_E_NOTFOUND", code)
    assert.is_truthy(message:find("wane pull org/nothing", 1, true))
    assert.is_truthy(message:find(cache, 1, true))
    local tok, why = wane.tokenizer.load "org/nothing"
    assert.is_nil(tok)
    assert.is_truthy(why:find("wane pull org/nothing", 1, true))
  end)
end)

describe("pull", function()
  it("fills the cache with what wane reads, verified, as links to blobs; a second one fetches nothing", function()
    local path = assert(pull "test/plain")
    assert.equal(cache .. "/models--test--plain/snapshots/" .. COMMIT, path)
    for _, name in ipairs { "config.json", "model.safetensors", "with space/a+b.json" } do assert.is_true(same(path, name)) end
    assert.is_nil(io.open(path .. "/a.onnx"))
    assert.equal(COMMIT, files.read(cache .. "/models--test--plain/refs/main"))
    assert.equal(0, os.execute(("test -L %s/config.json -a -L '%s/with space/a+b.json'"):format(path, path)))
    assert.equal("", io.popen("find " .. cache .. " -name '*.incomplete'"):read "*a")
    local model = assert(wane.load("test/plain", { tokenizer = false }))
    model:close()
    local before = #requests()
    assert.equal(path, pull "test/plain")
    assert.equal(before + 1, #requests())                -- the list alone
  end)

  it("takes a revision and patterns", function()
    local path = assert(pull("test/plain@refs/pr/1", { include = { "*.onnx", "conf?g.json" } }))
    assert.is_true(same(path, "a.onnx") and same(path, "config.json"))
    assert.is_nil(io.open(path .. "/model.safetensors"))
    assert.equal(COMMIT, files.read(cache .. "/models--test--plain/refs/refs/pr/1"))
    assert.is_truthy(requests()[1]:find("/revision/refs%2Fpr%2F1", 1, true))
    local none, message = pull("test/plain", { include = { "*.gguf" } })
    assert.is_nil(none)
    assert.is_truthy(message:find("*.gguf", 1, true))
  end)

  it("goes on where a dropped connection stopped", function()
    files.write(served .. "/three.json", ("0123456789"):rep(250))
    local path, _, _, tries = pull("test/drops", { include = { "three.json" } })
    assert.is_true(same(assert(path), "three.json"))
    assert.equal(2, #tries)
    local ranges = {}
    for _, line in ipairs(requests()) do if line:find "three" then ranges[#ranges + 1] = line:match "range=(%S+)" end end
    assert.same({ "nil", "1000", "2000" }, ranges)
  end)

  it("keeps what arrived when the tries are used up, and the next pull goes on from there", function()
    files.write(served .. "/long.json", ("0123456789"):rep(600))
    local path, message, code = pull("test/drops", { include = { "long.json" } })
    assert.is_nil(path)
    assert.equal("WANE_E_IO", code)
    assert.is_truthy(message:find("long.json", 1, true))
    assert.is_nil(io.open(cache .. "/models--test--drops/refs/main"))        -- no revision points at half a snapshot
    path = assert(pull("test/drops", { include = { "long.json" } }))
    assert.is_true(same(path, "long.json"))
    assert.equal(7, #requests() - 1)                                         -- two lists, six pieces
  end)

  it("starts anew with a server that cannot resume", function()
    local path = assert(pull("test/noresume", { include = { "three.json" } }))
    assert.is_true(same(path, "three.json"))
  end)

  it("does not believe in lengths, and never keeps bytes whose checksum is wrong", function()
    for kind, text in pairs { short = "of %d+ bytes", long = "more than the %d+ bytes", wrong = "checksum" } do
      local path, message, code, tries = pull("test/" .. kind, { include = { "model.safetensors" } })
      assert.is_nil(path, kind)
      assert.equal("WANE_E_IO", code)
      assert.is_truthy(message:find(text) or message:find "transfer closed", kind .. ": " .. message)
      assert.equal(4, #tries)
      assert.equal("", io.popen(("find %s/models--test--%s/blobs -type f ! -name '*.incomplete'"):format(cache, kind)):read "*a")
    end
  end)

  it("follows a redirect, without the token where it leads to another host", function()
    set("HF_TOKEN", "secret")
    local path = assert(pull("test/elsewhere", { include = { "config.json" } }))
    set("HF_TOKEN", nil)
    assert.is_true(same(path, "config.json"))
    local hub_auth, other_auth
    for _, line in ipairs(requests()) do
      if line:find "^/storage" then other_auth = line:match "auth=(.-) host" else hub_auth = line:match "auth=(.-) host" end
    end
    assert.equal("Bearer secret", hub_auth)
    assert.equal("nil", other_auth)
  end)

  it("gives a circle of redirects up", function()
    local path, message, _, tries = pull("test/circle", { include = { "config.json" } })
    assert.is_nil(path)
    assert.equal(0, #tries)
    assert.is_truthy(message:find "redirect")
  end)

  it("waits as long as a busy server asks", function()
    local clock = wane.core.C.wane_clock
    local started = clock()
    local path, _, _, tries = pull("test/busy", { include = { "config.json" } })
    assert.is_true(same(assert(path), "config.json"))
    assert.equal(1, #tries)
    assert.is_true(clock() - started >= 1)
  end)

  it("says what a refusal means", function()
    local _, message = pull "test/denied"
    assert.is_truthy(message:find "HF_TOKEN")
    _, message = pull "test/gone"
    assert.is_truthy(message:find "does not exist")
    _, message = pull "test/evil"
    assert.is_truthy(message:find("../escape", 1, true))
    _, message = pull "test/nosums"
    assert.is_truthy(message:find "checksum")
    _, message = pull "test/garbage"
    assert.is_truthy(message:find "list of files")
    _, message = pull "no such name"
    assert.is_truthy(message:find "org/name")
    set("HF_HUB_OFFLINE", "1")
    _, message = pull "test/plain"
    set("HF_HUB_OFFLINE", nil)
    assert.is_truthy(message:find "HF_HUB_OFFLINE")
  end)

  it("ends a silent connection, and at once when it is cancelled", function()
    local clock = wane.core.C.wane_clock
    local path, message, _, tries = pull "test/silent"
    assert.is_nil(path)
    assert.equal(4, #tries)
    assert.is_truthy(message:find "low speed" or message:find "slow" or message:find "imed out" or message:find "Operation")
    local started = clock()
    local code
    path, _, code = pull("test/silent", { cancelled = function() return clock() - started > 0.2 end })
    assert.is_nil(path)
    assert.equal("WANE_E_CANCELLED", code)
    assert.is_true(clock() - started < 0.9)
  end)

  it("is a command", function()
    local out = files.folder() .. "/out"
    assert.equal(0, os.execute(("%s pull test/plain --include 'conf*' --json >%s 2>&1"):format(program, out)))
    local result = cjson.decode(files.read(out))
    assert.equal(1, result.files)
    assert.is_true(same(result.path, "config.json"))
    assert.equal(256, os.execute(("%s pull test/gone >%s 2>&1"):format(program, out)))
    assert.is_truthy(files.read(out):find "does not exist")
    assert.equal(512, os.execute(("%s pull ../x >%s 2>&1"):format(program, out)))
  end)
end)
