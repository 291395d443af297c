--- The interactive session as a person meets it, on a pseudo-terminal, and as a pipe meets it.
local pty = require "support.pty"

local program = os.getenv "WANE_BIN" or "bin/wane"

-- Runs a session with the given lines on a pipe: its stdout, stderr and status.
local function piped(lines, environment)
  local errors = os.tmpname()
  local input = os.tmpname()
  local file = assert(io.open(input, "w"))
  file:write(lines)
  file:close()
  local pipe = io.popen(("%s %s < %s 2> %s; echo \"status $?\""):format(environment or "", program, input, errors))
  local out = pipe:read "*a"
  pipe:close()
  local e = assert(io.open(errors))
  local err = e:read "*a"
  e:close()
  os.remove(errors)
  os.remove(input)
  local body, status = out:match "^(.*)status (%d+)\n$"
  return body, err, tonumber(status)
end

describe("a session on a pipe", function()
  it("prints values, not prompts", function()
    local out, err, status = piped "1 + 1\nx = 'a'\nx .. 'b'\n3;\n_\nnil\n"
    assert.equal("", err)
    assert.equal('2\n"ab"\n3\nnil\n', out)
    assert.equal(0, status)
  end)

  it("prints the value behind the last semicolon or newline", function()
    assert.equal("3\n", (piped "x = 3; x\nx = 4; x;\n"))
  end)

  it("takes statements over several lines", function()
    assert.equal("1\n2\n", (piped "for i = 1, 2 do\n  print(i)\nend\n"))
    assert.equal('"a\\nb"\n', (piped "[[a\nb]]\n"))
  end)

  it("goes on after an error, with the user's frames, and says so in its status", function()
    local out, err, status = piped "local function f() error 'boom' end; local function g() f() return 1 end; g()\n1\n"
    assert.equal("1\n", out)
    assert.matches("^input:1: boom\n  at input:1 in 'f'\n  at input:1 in 'g'\n", err)
    assert.is_nil(err:find("repl/", 1, true))
    assert.equal(1, status)
  end)

  it("tells what a syntax error is", function()
    local _, err = piped "x = = 1\n"
    assert.matches("^input:1: unexpected symbol near '='", err)
  end)

  it("has wane at hand without a global for anyone else", function()
    assert.equal('"table"\n', (piped "type(wane)\n"))
    assert.equal("nil\n", (piped "rawget(getfenv(print), 'wane')\n"))
    assert.equal("nil\n1\n", (piped "y = 1\nrawget(getfenv(print), 'y')\ny\n"))
  end)

  it("answers ?name", function()
    assert.matches("^wane%.load%(path, opts%)\nLoads a model", (piped "?wane.load\n"))
    assert.matches("wane_stream_cancel%(wane_stream %*s%);\nSkips everything enqueued", (piped "?wane_stream_cancel\n"))
    assert.matches("Ctrl%-R", (piped "?\n"))
  end)

  it("survives an error without a message", function()
    local out, err = piped "error()\n1\n"
    assert.equal("1\n", out)
    assert.equal("error without a message\n", err)
  end)

  it("refuses code that yields to nobody", function()
    local _, err = piped "coroutine.yield(1)\n"
    assert.matches("nobody to resume", err)
  end)
end)

describe("a session on a terminal", function()
  local it = pty.it(it, pending)
  local p
  local state = os.tmpname()
  local function start(options)
    options = options or {}
    options.env = options.env or { WANE_HISTORY = state, TERM = "xterm" }
    p = pty.spawn({ program }, options)
    p:expect "ctrl%-D leaves.-2004h"         -- keys typed earlier would be the cooked terminal's
  end
  after_each(function() if p then p:close() end end)
  teardown(function() os.remove(state) end)

  it("edits, prints, remembers", function()
    start()
    p:send "1 +\r2\r"
    p:expect "\n.-3\r"
    p:send "\27[A\r"
    p:expect "\n.-3\r"
    p:expect "2004h"
    p:send "\4"
    assert.equal(0, p:wait())
    start()
    p:send "\18+\r"
    p:expect "\27%[%?2004l3\r"
  end)

  it("stops an endless loop with ctrl-C and keeps what was there", function()
    start()
    p:send "kept = 42\rwhile true do end\r"
    p:expect "do end.-2004l"
    os.execute "sleep 0.3"
    p:send "\3"
    p:expect "interrupted"
    p:send "kept\r"
    p:expect "2004l42\r"
  end)

  it("stops a wait for the library's workers with ctrl-C", function()
    start()
    p:send "core = wane.core h = core.handle_type() core.check(core.C.wane_tensor_new(core.stream(), h, 0, 1, core.shape{1})) \r"
    p:expect "2004h"
    p:send "for i = 1, 1e9 do core.C.wane_fill(core.stream(), h, 1) core.wait() end\r"
    p:expect "core%.wait.-2004l"
    os.execute "sleep 0.3"
    p:send "\3"
    p:expect "interrupted"
    p:send "core.check(core.C.wane_fill(core.stream(), h, 7)) core.wait()\r"
    p:expect "2004h"
    p:send "'still ' .. 'here'\r"
    p:expect '"still here"'
  end)

  local model = os.getenv "WANE_DEMO_MODEL" or ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
  it("stops a generation with ctrl-C and goes on with the same model", function()
    local file = io.open(model)
    if not file then pending "scripts/fetch-model has not been run" return end
    file:close()
    start { columns = 200 }
    p:send(("model, tok = assert(wane.load('%s', { quant = 'nf4' }))\r"):format(model))
    p:expect("2004h", 120)
    p:send "for piece in model:stream(tok, 'Once upon a time', { max_new_tokens = 1500, ignore_eos = true }) do io.write(piece) io.flush() end\r"
    p:expect("flush%(%) end\27?.-2004l.-%a+ %a+ %a+ ", 120)
    p:send "\3"
    p:expect "interrupted"
    p:send "#model:generate({ { 1, 2, 3 } }, { max_new_tokens = 4 })[1]\r"
    p:expect("2004l4\r", 120)
  end)

  it("ends at the third ctrl-C when code does not stop", function()
    start()
    p:send "pcall(function() while true do pcall(string.rep, 'x', 1e5) end end) while true do pcall(error) end\r"
    p:expect "error%) end\27?.-2004l"
    for _ = 1, 3 do
      os.execute "sleep 0.2"
      p:send "\3"
    end
    assert.equal(130, p:wait())
  end)

  it("completes fields and shows what there is", function()
    start()
    p:send "wane.mem\t().rss_peak > 0\r"
    p:expect "2004ltrue\r"
    p:send "string.re\t\t"
    p:expect "rep.*reverse"
    p:send "\3"
  end)

  it("takes pasted functions whole", function()
    start()
    p:send "\27[200~function twice(x)\n  return 2 * x\nend\27[201~\rtwice(21)\r"
    p:expect "2004l42\r"
  end)

  it("prints wide characters and narrow screens without losing the line", function()
    start { columns = 20, env = { WANE_HISTORY = "", TERM = "xterm" } }
    p:send "'漢字漢字漢字漢字漢字' == ''\r"
    p:expect "2004lfalse\r"
  end)

  it("shows what took longer than a tenth of a second", function()
    start()
    p:send "os.execute 'sleep 0.2'\r"
    p:expect "0%.2%d s"
  end)

  it("lets timers run while a line is being edited, and prints above it", function()
    start()
    p:send "uv = require 'luv' t = uv.new_timer() t:start(300, 0, function() print 'tick' t:close() end)\r"
    p:expect "2004h"
    p:send "'half a li"
    p:expect "tick\r"
    p:expect "'half a li"
    p:send "ne'\r"
    p:expect '"half a line"'
  end)

  it("reads plain lines on a dumb terminal", function()
    p = pty.spawn({ program }, { env = { TERM = "dumb", WANE_HISTORY = "" } })
    p:send "6 * 7\r"
    p:expect "> 42\r"
    p:send "\4"
    assert.equal(0, p:wait())
    p = pty.spawn({ program }, { env = { TERM = "xterm", WANE_HISTORY = "", WANE_PLAIN = "1" } })
    p:send "6 * 7\r"
    p:expect "> 42\r"
  end)
end)
