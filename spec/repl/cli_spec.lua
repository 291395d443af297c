--- What the commands share: values, JSON, the progress line, exit statuses.
local cli = require "wane.cli"
local pty = require "support.pty"

local program = os.getenv "WANE_BIN" or "bin/wane"

describe("the commands' values", function()
  it("reads whole numbers, numbers and lists", function()
    assert.equal(12, cli.count "12")
    assert.is_nil(cli.count "-1")
    assert.is_nil(cli.count "1.5")
    assert.equal(-0.5, cli.number "-0.5")
    assert.is_nil(cli.number "nan")
    assert.is_nil(cli.number "x")
    assert.same({ 1, 22, 3 }, cli.ids "1, 22,3")
    assert.is_nil(cli.ids "1,,2")
    assert.is_nil(cli.ids "")
  end)

  it("reads and writes sizes", function()
    assert.equal(10 * 2^30, cli.size "10GiB")
    assert.equal(512 * 2^20, cli.size "512M")
    assert.equal(2e9, cli.size "2 GB")
    assert.equal(77, cli.size "77")
    assert.is_nil(cli.size "10 parsecs")
    assert.is_nil(cli.size "GiB")
    assert.equal("999 B", cli.bytes(999))
    assert.equal("85.2 MB", cli.bytes(85.2e6))
    assert.equal("1.25 GB", cli.bytes(1.25e9))
    assert.equal("0.25 s", cli.seconds(0.25))
    assert.equal("2 min 5 s", cli.seconds(125))
  end)

  it("writes JSON that another parser reads back exactly", function()
    local cjson = require "cjson"
    local value = { text = 'a "quoted"\n\tline\\ \1 ü', list = { 1, 2.5, 0.1 }, deep = { { x = true } }, big = 2^52, tiny = 1 / 3 }
    assert.same(value, cjson.decode(cli.to_json(value)))
    assert.equal(1 / 3, cjson.decode(cli.to_json(value)).tiny)
    assert.equal('{"a":[],"b":null,"c":1}', cli.to_json { a = {}, b = 0 / 0, c = 1 })
    assert.equal("null", cli.to_json(math.huge))
  end)

  it("aligns columns", function()
    assert.equal("name  value\na         1\nlong     22", cli.columns { { "name", "value" }, { "a", 1 }, { "long", 22 } })
  end)

  it("turns options into those of wane.load", function()
    local options = cli.load_options { quant = "nf4", block_size = 64, double_quant = true, skip = { "lm_head" }, compute = "bf16" }
    assert.same({ compute = "bf16", quant = { type = "nf4", block_size = 64, double_quant = true, skip = { "lm_head" }, compute = "bf16" } }, options)
    assert.same({}, cli.load_options { quant = "none", skip = {} })
  end)
end)

describe("the progress line", function()
  local on_terminal = pty.it(it, pending)
  local code = [[-e 'local p = require("wane.cli").progress "loading x"
    for i = 1, 4 do p:update(i * 1e6, 4e6, i) os.execute "sleep 0.15" end p:finish() print "done"']]

  on_terminal("is drawn on a terminal and taken away again", function()
    local p = pty.spawn { "sh", "-c", program .. " " .. code }
    p:expect "loading x %[=+ *%] +50 %%  2%.00 MB of 4%.00 MB  2 tensors"
    p:expect "\r\27%[Kdone"
    assert.equal(0, p:wait())
  end)

  it("is silent where stderr is no terminal", function()
    local pipe = io.popen(program .. " " .. code .. " 2>&1")
    assert.equal("done\n", pipe:read "*a")
    pipe:close()
  end)
end)

describe("a command on a terminal", function()
  local it = pty.it(it, pending)
  local model = os.getenv "WANE_DEMO_MODEL" or ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"

  it("ends with 130 after ctrl-C in the middle of an answer", function()
    local file = io.open(model)
    if not file then pending "scripts/fetch-model has not been run" return end
    file:close()
    local p = pty.spawn { program, "generate", "--model", model, "--prompt", "Once upon a time", "--max-new-tokens", "2000", "--ignore-eos" }
    p:expect("%a+ %a+ %a+ ", 120)
    p:send "\3"
    p:expect "wane generate: interrupted"
    assert.equal(130, p:wait())
  end)
end)
