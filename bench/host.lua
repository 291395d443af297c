--- How long a libuv loop is held while wane loads a model, reads a long prompt and generates: a 5 ms timer's gaps, beside the gaps of
-- the same loop doing nothing.
--
--     luajit bench/host.lua MODEL [quant] [runs] [prompt tokens] [new tokens]
package.path = "./lua/?.lua;./lua/?/init.lua;" .. package.path
local uv = require "luv"
local wane = require "wane"
local host = require "wane.host.luv"

local path, quant, runs, prompt, new = arg[1], arg[2] or "nf4", tonumber(arg[3] or 5), tonumber(arg[4] or 1500), tonumber(arg[5] or 50)
assert(path, "usage: luajit bench/host.lua MODEL [quant] [runs] [prompt tokens] [new tokens]")

-- Gaps of a 5 ms timer, in ms, until stop() is called.
local function ticker()
  local gaps, last = {}, uv.hrtime()
  local timer = uv.new_timer()
  timer:start(5, 5, function()
    local now = uv.hrtime()
    gaps[#gaps + 1] = (now - last) / 1e6
    last = now
  end)
  return gaps, function() timer:stop() timer:close() end
end

local function summary(gaps)
  table.sort(gaps)
  return gaps[#gaps] or 0, gaps[math.max(1, math.ceil(#gaps * 0.99))] or 0, #gaps
end

local function median(list)
  table.sort(list)
  return list[math.ceil(#list / 2)]
end

local function idle(ms)
  local gaps, stop = ticker()
  local timer = uv.new_timer()
  timer:start(ms, 0, function() stop() timer:close() end)
  uv.run()
  return summary(gaps)
end

local longest, nines = {}, {}
print(("idle loop: longest gap %.1f ms, 99th percentile %.1f ms"):format(idle(2000)))
for run = 1, runs do
  local gaps, stop = ticker()
  local text, failed, marks = {}, nil, {}
  local function mark(name) marks[#marks + 1] = ("%s at gap %d"):format(name, #gaps) end
  host.run(function()
    local model, tok = assert(wane.load(path, { quant = quant ~= "none" and quant or nil }))
    mark "loaded"
    local ids, sentence = {}, tok and tok:encode "The quick brown fox jumps over the lazy dog. " or { 1, 2, 3, 4, 5 }
    while #ids < prompt do ids[#ids + 1] = sentence[#ids % #sentence + 1] end
    local first
    for piece in model:stream(tok, ids, { max_new_tokens = new, ignore_eos = true }) do
      if not first then first = true mark "first token" end
      text[#text + 1] = piece
    end
    mark "done"
    model:close()
  end, function(err)
    failed = err
    stop()
  end)
  uv.run()
  if failed then error(failed, 0) end
  local worst, place = 0, 0
  for i, g in ipairs(gaps) do if g > worst then worst, place = g, i end end
  local l, p, n = summary(gaps)
  longest[run], nines[run] = l, p
  print(("run %d: longest gap %.1f ms (gap %d; %s), 99th percentile %.1f ms, %d ticks, %d bytes of text"):format(
    run, l, place, table.concat(marks, ", "), p, n, #table.concat(text)))
end
print(("median of %d runs: longest gap %.1f ms, 99th percentile %.1f ms"):format(runs, median(longest), median(nines)))
print(("idle loop again: longest gap %.1f ms, 99th percentile %.1f ms"):format(idle(2000)))
