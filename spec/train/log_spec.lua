-- The log of a run, and its curve.
local cjson = require "cjson"
local curve = require "wane.train.curve"
local data = require "wane.train.data"
local log = require "wane.train.log"
local paths = require "wane.checkpoint.paths"
local saves = require "wane.train.saves"
local wane = require "wane"
local support = require "train.support"

local folder, write, open, adapted, with = support.folder, support.write, support.open, support.adapted, support.with

describe("logs and curves", function()
  it("a log goes on from a step, without a line that a kill cut short", function()
    local path = write(folder() .. "/l.jsonl", '{"step":1,"loss":3}\n{"step":2,"loss":2}\n{"step":3,"loss":1}\n{"step":')
    local l = assert(log.open(path, 2))
    l:add { step = 3, loss = 0.5 }
    l:add { step = 4, loss = 0 / 0 }
    l:close()
    local f = assert(io.open(path))
    assert.matches('"loss": 2,.-\n.-"loss": 0.5,.-\n.-"loss": null,', f:read "*a")
    f:close()
    assert.same({ { 1, 3 }, { 2, 2 }, { 3, 0.5 } }, l:points "loss")
    assert.equal(4, #l.records)
    for _, place in ipairs { "/nowhere/l.jsonl", folder() } do
      local none, message = log.open(place)
      assert.is_nil(none)
      assert.matches("cannot write the log: ", message)
    end
  end)

  it("a new log leaves what stands there until it has a record", function()
    local old = '{"step": 9, "loss": 1}'
    local path = write(folder() .. "/l.jsonl", old .. "\n")
    assert(log.open(path)):close()
    assert.equal(old, io.open(path):read "*l")
    local l = assert(log.open(path))
    l:add { step = 1, loss = 1 }
    l:add { step = 2, loss = 1 }
    l:close()
    local steps = {}
    for line in io.lines(path) do steps[#steps + 1] = cjson.decode(line).step end
    assert.same({ 1, 2 }, steps)
  end)

  it("a log is written over nothing but another log, and never over the data", function()
    local dir = folder()
    local path, model = dir .. "/mine.jsonl", adapted()
    for _, text in ipairs { "old\n", '{"text":"a"}\n', '{"step":1,"text":"a"}\n', "\n", "[1]\n" } do
      write(path, text)
      local ok, message, code = wane.train.run(model, open(), with { max_steps = 1, log = path })
      assert.is_nil(ok)
      assert.matches("cannot write the log: '.*/mine.jsonl' is there, and no log of wane: choose another file", message)
      assert.equal("io", code)
      assert.equal(text, io.open(path):read "*a")
    end
    write(path, '{"step":1,"loss":2,"input_ids":[5,6,7]}\n')         -- a log by its first line
    os.execute(("ln -s mine.jsonl %s/link.jsonl"):format(dir))
    for data_path, log_path in pairs { [path] = path, [dir .. "/link.jsonl"] = path, [dir .. "/../" .. dir:match "[^/]*$" .. "/mine.jsonl"] = path } do
      local rows = assert(data.open(data_path, nil))
      assert.matches("cannot write the log: .* is the data", (select(2, wane.train.run(model, rows, with { max_steps = 1, log = log_path }))))
      assert.matches("is the data", (select(2, wane.train.run(model, open(), with { max_steps = 1, log = log_path, eval_rows = rows, eval_every = 1 }))))
    end
    write(path, "")
    assert(wane.train.run(model, open(), with { max_steps = 1, log = path }))
    assert(wane.train.run(model, open(), with { max_steps = 1, log = path }))
    model:close()
  end)

  it("a log is written through a link, and over no pipe or device", function()
    local dir = folder()
    write(dir .. "/real.jsonl", "")
    os.execute(("ln -s real.jsonl %s/link.jsonl; mkfifo %s/pipe"):format(dir, dir))
    local l = assert(log.open(dir .. "/link.jsonl"))
    l:add { step = 1, loss = 1 }
    l:close()
    assert.equal(1, cjson.decode(io.open(dir .. "/real.jsonl"):read "*l").step)
    assert.equal(0, os.execute(("test -h %s/link.jsonl"):format(dir)))
    for _, path in ipairs { dir .. "/pipe", "/dev/null", dir } do
      assert.matches("is a folder, a device or a pipe", (select(2, log.open(path))))
    end
    assert.equal(0, os.execute(("test -p %s/pipe && test -c /dev/null"):format(dir)))
  end)

  it("a log is one run's at a time", function()
    local dir, patience = folder(), saves.patience
    saves.patience = 0.1
    local first = assert(log.open(dir .. "/l.jsonl"))
    local second, message, code = log.open(dir .. "/l.jsonl")
    assert.is_nil(second)
    assert.matches("another run writes the log '.*/l.jsonl': .* is held by process %d+", message)
    assert.equal("busy", code)
    first:close()
    assert(log.open(dir .. "/l.jsonl")):close()
    assert.same({}, paths.list(dir))                                      -- the lock is gone
    saves.patience = patience
  end)

  it("a full disk under a log is told", function()
    local l = assert(log.open(folder() .. "/l.jsonl"))
    l:add { step = 6, loss = 1 }
    l.file:close()
    l.file = assert(io.open("/dev/full", "w"))
    assert.error_matches(function() l:add { step = 7, loss = 1 } end, "the line of step 7 was not written: .*[Nn]o space")
  end)

  it("a curve is drawn in a terminal's characters", function()
    local points = {}
    for i = 1, 100 do points[i] = { i, 5 - i / 25 } end
    local text = curve.terminal({ { name = "loss", points = points } }, 60, 8)
    local lines = {}
    for line in text:gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.equal(10, #lines)
    assert.matches("^ 4%.96│⠉", lines[1])
    assert.matches("^    1│.+[^ ]$", lines[8])
    assert.matches("^ +1 +100$", lines[10])
    assert.equal("", curve.terminal({ { name = "loss", points = {} } }, 60, 8))
  end)

  it("a curve of one update has an axis of one step, and a dot", function()
    local one = { { name = "loss", points = { { 1, 2 } } } }
    local lines = {}
    for line in curve.terminal(one, 24, 4):gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.equal("    │         ⠈", lines[3])
    assert.equal("              1", lines[6])
    local svg = curve.svg(one, "one")
    assert.matches('<circle cx="384%.0" cy="178%.0"', svg)
    assert.matches('<text x="384%.0" y="334" text%-anchor="middle">1</text>', svg)
    assert.equal(1, select(2, svg:gsub('y="334"', "")))
    -- Steps are whole, however few.
    svg = curve.svg({ { name = "loss", points = { { 1, 4 }, { 3, 2 } } } }, "three")
    assert.equal(3, select(2, svg:gsub('y="334"', "")))
  end)

  it("and as an SVG with axes, both curves and a title", function()
    local svg = curve.svg({ { name = "loss", points = { { 1, 4 }, { 10, 2 } } }, { name = "held out", points = { { 5, 3 } } } }, "a < b & c")
    assert.matches("^<svg xmlns=", svg)
    assert.matches("a &lt; b &amp; c", svg)
    assert.equal(1, select(2, svg:gsub("<polyline", "")))
    assert.equal(1, select(2, svg:gsub("<circle", "")))                   -- a line of one point would not be seen
    assert.matches(">step<", svg)
    assert.matches('points="64%.0,40%.0 704%.0,316%.0"', svg)
    assert.matches("</svg>\n$", svg)
    assert.is_string(curve.svg({ { name = "loss", points = {} } }, "empty"))
  end)
end)
