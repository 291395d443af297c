-- `wane tokenize`: options, output, exit status.
local support = require "support.text"
local cjson = require "cjson"

local function run(args, stdin)
  local out, err = os.tmpname(), os.tmpname()
  local feed = stdin and ("printf %%s %s | "):format(stdin) or ""
  local command = ("%s${WANE_TEST_LUA:-luajit} scripts/tokenize.lua %s >%s 2>%s; echo $?"):format(feed, args, out, err)
  local p = io.popen("export LUA_PATH='./lua/?.lua;./lua/?/init.lua;;'; " .. command)
  local status = tonumber(p:read "*a")
  p:close()
  local text, message = support.read(out), support.read(err)
  os.remove(out)
  os.remove(err)
  return status, text, message
end

describe("wane tokenize", function()
  local model = "--model " .. support.fixtures .. "llama2 "

  it("prints ids and tokens", function()
    local status, text = run(model .. "--json --text 'Hello hello'")
    assert.equal(0, status)
    assert.same({ ids = { 1, 1042, 327, 720, 337, 941, 720, 337 }, tokens = { "<s>", "▁H", "e", "ll", "o", "▁he", "ll", "o" } }, cjson.decode(text))
    status, text = run(model .. "--text Hello")
    assert.equal(0, status)
    assert.matches("1042%s+▁H", text)
  end)

  it("reads stdin and leaves special tokens out", function()
    local status, text = run(model .. "--json --no-special", "Hello")
    assert.equal(0, status)
    assert.same({ 1042, 327, 720, 337 }, cjson.decode(text).ids)
  end)

  it("decodes", function()
    local status, text = run(model .. "--json --decode 1,1042,327,720,337")
    assert.equal(0, status)
    assert.equal("<s> Hello", cjson.decode(text).text)
    status, text = run(model .. "--no-special --decode 1,1042,327,720,337")
    assert.equal(0, status)
    assert.equal("Hello\n", text)
  end)

  it("ends with 1 for a bad model, with 2 for wrong usage", function()
    local status, text, message = run "--model /nonexistent --text x"
    assert.equal(1, status)
    assert.equal("", text)
    assert.matches("no tokenizer at /nonexistent", message)
    assert.equal(2, (run "--text x"))
    assert.equal(2, (run(model .. "--text x --decode 1")))
    assert.equal(2, (run(model .. "--decode x")))
    assert.equal(2, (run(model .. "--nonsense")))
    assert.equal(0, (run "--help"))
  end)
end)
