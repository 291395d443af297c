--- The `wane` program's arguments, and every command's --help and wrong usage.
local program = os.getenv "WANE_BIN" or "bin/wane"

-- Runs the program; its stdout, stderr and status. stdin is empty unless the arguments say otherwise.
local function wane(arguments)
  local errors = os.tmpname()
  local pipe = io.popen(("%s %s </dev/null 2>%s; echo \"status $?\""):format(program, arguments, errors))
  local out = pipe:read "*a"
  pipe:close()
  local file = assert(io.open(errors))
  local err = file:read "*a"
  file:close()
  os.remove(errors)
  local body, status = out:match "^(.*)status (%d+)\n$"
  return tonumber(status), body, err
end

local function with_file(text, run)
  local path = os.tmpname()
  local file = assert(io.open(path, "w"))
  file:write(text)
  file:close()
  local ok, message = pcall(run, path)
  os.remove(path)
  if not ok then error(message, 0) end
end

-- Names of the commands as `wane --help` lists them.
local function listed()
  local names = {}
  local _, out = wane "--help"
  for name in out:gmatch "\n  (%l+)  +%l" do if name ~= "wane" then names[#names + 1] = name end end
  return names
end

describe("the program", function()
  it("runs a file with its arguments", function()
    with_file("print(arg[0] == ..., arg[1], select('#', ...), ...)", function(path)
      local status, out = wane(path .. " a 'b c'")
      assert.equal(0, status)
      assert.equal("false\ta\t2\ta\tb c\n", out)
    end)
  end)

  it("runs a line of code", function()
    local status, out = wane "-e 'print(1 + 1, ...)' x"
    assert.equal(0, status)
    assert.equal("2\tx\n", out)
  end)

  it("reports a script's error on stderr, without its own frames, and ends with 1", function()
    with_file("local function inner() error 'boom' end\nlocal function outer() inner() return 1 end\nouter()", function(path)
      local status, out, err = wane(path)
      assert.equal(1, status)
      assert.equal("", out)
      local name = path:gsub("%p", "%%%0")
      assert.matches("^wane: " .. name .. ":1: boom\n  at " .. name .. ":1 in 'inner'\n  at " .. name .. ":2 in 'outer'\n  at " .. name .. ":3\n$", err)
    end)
  end)

  it("keeps os.exit's status and reports errors that are no strings", function()
    assert.equal(7, (wane "-e 'os.exit(7)'"))
    local status, _, err = wane "-e 'error({})'"
    assert.equal(1, status)
    assert.matches("error of type table", err)
  end)

  it("knows its version and its usage", function()
    local status, out = wane "--version"
    assert.equal(0, status)
    assert.matches("^wane %d+%.%d+%.%d+ %(LuaJIT", out)
    status, out = wane "--help"
    assert.equal(0, status)
    assert.matches("^usage: wane", out)
  end)

  it("refuses what it does not know with status 2", function()
    for _, arguments in ipairs { "--nonsense", "nonsense", "-e" } do
      local status, out, err = wane(arguments)
      assert.equal(2, status, arguments)
      assert.equal("", out)
      assert.matches("^wane: ", err)
    end
    assert.equal(1, (wane "missing.lua"))
  end)

  it("works from any folder and through a link", function()
    local link = os.tmpname()
    os.remove(link)
    local here = io.popen("pwd"):read "*l"
    local absolute = program:sub(1, 1) == "/" and program or here .. "/" .. program
    os.execute(("ln -s %s %s"):format(absolute, link))
    local pipe = io.popen(("cd / && %s -e 'print(require(\"wane\").version)' 2>&1"):format(link))
    assert.matches("^%d+%.%d+%.%d+\n$", pipe:read "*a")
    pipe:close()
    os.remove(link)
  end)
end)

describe("every command", function()
  local names = listed()

  it("is listed by --help", function()
    for _, name in ipairs { "chat", "doctor", "evaluate", "generate" } do
      local found = false
      for _, n in ipairs(names) do found = found or n == name end
      assert.is_true(found, name)
    end
  end)

  for _, name in ipairs(names) do
    it(name .. " explains itself", function()
      local status, out, err = wane(name .. " --help")
      assert.equal(0, status)
      assert.equal("", err)
      assert.matches("^Usage: wane " .. name, out)
    end)

    it(name .. " refuses an unknown option with status 2", function()
      local status, out, err = wane(name .. " --no-such-option")
      assert.equal(2, status)
      assert.equal("", out)
      assert.matches("unknown option", err)
    end)
  end

  for _, name in ipairs { "generate", "evaluate", "chat" } do
    it(name .. " asks for --model with status 2", function()
      local status, _, err = wane(name)
      assert.equal(2, status)
      assert.matches("%-%-model is missing", err)
    end)

    it(name .. " reports a missing model with status 1 and one line", function()
      local more = name == "generate" and " --prompt x" or name == "evaluate" and " --text premake5.lua" or ""
      local status, out, err = wane(name .. " --model /nowhere/model.gguf" .. more)
      assert.equal(1, status)
      assert.equal("", out)
      assert.matches("^wane " .. name .. ": [^\n]*/nowhere/model%.gguf[^\n]*\n$", err)
    end)
  end

  it("refuses what belongs to later versions with status 2", function()
    for _, arguments in ipairs { "--beams 4", "--device-map auto", "--max-memory 1GiB" } do
      local status, _, err = wane("generate --model x --prompt y " .. arguments)
      assert.equal(2, status, arguments)
      assert.matches("not part of this version", err)
    end
  end)
end)

describe("doctor", function()
  it("prints a report for people", function()
    local status, out, err = wane "doctor"
    assert.equal(0, status)
    assert.equal("", err)
    assert.matches("processor .*instructions .*threads", out)
  end)

  it("prints one JSON object", function()
    local status, out = wane "doctor --json"
    assert.equal(0, status)
    local report = require("cjson").decode(out)
    assert.equal("string", type(report.cpu.name))
    assert.is_true(report.threads >= 1)
    assert.is_true(report.memory.limit > 0)
    assert.equal("table", type(report.ops.fallback))
    assert.equal(1, select(2, out:gsub("\n", "")))
  end)

  it("says that WANE_CPU lowers the level", function()
    local pipe = io.popen("WANE_CPU=generic " .. program .. " doctor --json 2>&1")
    local report = require("cjson").decode(pipe:read "*a")
    pipe:close()
    assert.equal("generic", report.cpu.level)
    if report.cpu.best ~= "generic" then assert.matches("WANE_CPU lowers", table.concat(report.troubles, "\n")) end
  end)
end)

describe("mistakes that a command must tell", function()
  it("a full disk under stdout is a failure", function()
    local status = os.execute(program .. " doctor --json >/dev/full 2>/dev/null")
    assert.is_true(status ~= 0 and status ~= nil)
  end)

  it("a text file called .gguf", function()
    local path = os.tmpname() .. ".gguf"
    local file = assert(io.open(path, "w"))
    file:write "hello world\n"
    file:close()
    local status, _, err = wane("inspect " .. path)
    os.remove(path)
    assert.equal(1, status)
    assert.matches("is no GGUF file", err)
  end)
end)

describe("wane quantize's folder", function()
  local source = "spec/fixtures/models/llama"

  it("is never the model's own, and is not read through what an earlier run left", function()
    local status, _, err = wane(("quantize --model %s --quant nf4 --out %s/../llama"):format(source, source))
    assert.equal(1, status)
    assert.matches("own folder", err)
    local dir = os.tmpname()
    os.remove(dir)
    assert.equal(0, (wane(("quantize --model %s --quant nf4 --out %s"):format(source, dir))))
    assert.equal(0, (wane(("quantize --model %s --quant int8 --max-shard-size 40K --out %s"):format(source, dir))))
    local _, out = wane("inspect " .. dir)
    os.execute("rm -r " .. dir)
    assert.matches("q_proj.weight +int8", out)
  end)

  it("comes with a word about what was asked in vain", function()
    local dir = os.tmpname()
    os.remove(dir)
    local command = ("quantize --model %s --out %s "):format(source, dir)
    local status, _, err = wane(command .. "--quant nf4 --max-shard-size 0")
    assert.equal(2, status)
    assert.matches("max%-shard%-size", err)
    status, _, err = wane(command .. "--quant nf4 --skip lm_head --skip no_such")
    assert.equal(0, status)
    assert.matches("%-%-skip no_such matches no layer", err)
    assert.is_nil(err:find "skip lm_head" or err:find "nothing is quantized")
    with_file("*.self_attn.* none\n*.mlp.* none\n", function(rules)
      status, _, err = wane(command .. "--quant nf4 --rules " .. rules)
    end)
    os.execute("rm -r " .. dir)
    assert.equal(0, status)
    assert.matches("nothing is quantized", err)
    assert.is_nil(err:find "GGUF")
  end)
end)
