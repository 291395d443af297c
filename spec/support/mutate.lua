--- Mutation tests of parsers: thousands of damaged inputs, none of which may crash, hang, take memory or fail without saying where.
--
--     mutate.run {
--       name = "safetensors headers", sources = { good_file }, words = mutate.json_words, path = folder .. "/t.safetensors",
--       try = function(path, bytes)                -- the bytes are in the file `path` (without `path`: only given as `bytes`)
--         local ix, message, code = index.open(path)
--         if not ix then return nil, message, code end
--         …use what was read…; ix:close()
--         return true
--       end,
--     }
--
-- `try` returns true, or nil, message, code as every function does that meets the outside world. The run fails (as a busted assertion)
-- at the first input that raises, whose message does not name the file, that has no code, or that takes longer or more memory than allowed;
-- the failure tells the round, from which `mutate.input` makes the same bytes again. WANE_FUZZ_ROUNDS and WANE_FUZZ_SEED make a longer run, or
-- another one, of every such test.
local bit = require "bit"
local core = require "wane.core"

local M = {}

--- Bits of JSON that make more interesting trouble than random bytes.
M.json_words = { "{", "}", "[", "]", ",", ":", "null", "true", "-1", "1e9", '"', '""', "99999999", "18446744073709551615", "\\u0000", "{}", "\0", "../" }

--- A generator of whole numbers in [1, n], the same on every machine (math.random is the C library's in plain Lua).
-- @param seed integer
-- @return function(n)
function M.random(seed)
  local state = seed % 2147483646 + 1
  return function(n)
    state = (state * 16807) % 2147483647
    return state % n + 1
  end
end

-- ---------------------------------------------------------------- injuries

-- Numbers that sizes and counts are made of when a file lies.
local lies = { "\0", "\255", "\127", "\128", "\255\255\255\255", "\255\255\255\127", "\0\0\0\128", "\0\0\0\0\1\0\0\0", ("\255"):rep(8),
               ("\255"):rep(7) .. "\127", ("\0"):rep(8), "\1\0\0\0\0\0\0\0" }

local function put(bytes, at, text) return bytes:sub(1, at - 1) .. text .. bytes:sub(at + #text) end

-- Each: bytes, place, random, words -> bytes
local injuries = {
  function(bytes, at, random) return put(bytes, at, string.char(random(256) - 1)) end,                                -- any byte
  function(bytes, at, random) return put(bytes, at, string.char(31 + random(95))) end,                                -- a printable one
  function(bytes, at, random) return put(bytes, at, string.char(bit.bxor(bytes:byte(at), 2 ^ (random(8) - 1)))) end,  -- a bit
  function(bytes, at, random) return put(bytes, at, lies[random(#lies)]) end,
  function(bytes, at, random) return bytes:sub(1, at - 1) .. bytes:sub(at + random(40)) end,                          -- a span goes
  function(bytes, at, random) return bytes:sub(1, at) .. bytes:sub(at, at + random(40)) .. bytes:sub(at + 1) end,     -- a span doubled
  function(bytes, at) return bytes:sub(1, at - 1) end,                                                                -- the end goes
  function(bytes, at, random, words) return bytes:sub(1, at - 1) .. words[random(#words)] .. bytes:sub(at + random(3) - 1) end,
  function(bytes, at, random) return put(bytes, at, bytes:sub(random(#bytes)):sub(1, random(16))) end,                -- a piece from elsewhere
  function(bytes, at, random) return bytes .. bytes:sub(at, at + random(200)) end,                                    -- something appended
}

--- One to three small injuries to bytes.
-- @param bytes string not empty
-- @param random function of M.random
-- @param words string[]|nil texts that may be put in
-- @param span table|nil { first, last }: where the injuries go (default: everywhere)
-- @return string
function M.damage(bytes, random, words, span)
  local first, last = span and span[1] or 1, span and span[2] or #bytes
  for _ = 1, random(3) do
    if #bytes == 0 then return bytes end
    local top = math.max(1, math.min(last, #bytes))
    local at = math.min(first, top) - 1 + random(top - math.min(first, top) + 1)
    bytes = injuries[random(#injuries)](bytes, at, random, words or lies)
  end
  return bytes
end

--- The bytes of a round of `run` with these options.
-- @param options table as run takes it
-- @param round integer from 1
-- @return string
function M.input(options, round)
  local sources = options.sources
  local which = (round - 1) % #sources + 1
  local random = M.random((tonumber(os.getenv "WANE_FUZZ_SEED") or options.seed or 20240607) + round * 7919)
  for _ = 1, 3 do random(2) end                         -- neighbouring seeds begin alike
  return M.damage(sources[which], random, options.words, options.spans and options.spans[which])
end

-- ---------------------------------------------------------------- the run

-- Makes VmHWM count from now on, where the system allows it.
local function forget_peak()
  local f = io.open("/proc/self/clear_refs", "w")
  if not f then return end
  f:write "5"
  f:close()
end

local function memory()
  local m = require("ffi").new "wane_memory"
  core.C.wane_memory_read(m)
  return tonumber(m.rss_peak), tonumber(m.heap_peak), tonumber(m.rss)
end

local function write(path, bytes)
  local f = assert(io.open(path, "wb"))
  assert(f:write(bytes))
  f:close()
end

local function fail(options, round, what, ...)
  error(("%s, round %d: %s"):format(options.name, round, what:format(...)), 0)
end

local function attempt(options, round)
  local bytes = M.input(options, round)
  if options.path then write(options.path, bytes) end
  local started = core.C.wane_clock()
  local ok, value, message, code = pcall(options.try, options.path, bytes)
  local seconds = core.C.wane_clock() - started
  if not ok then fail(options, round, "raised: %s", tostring(value)) end
  if not value then
    if type(message) ~= "string" or message == "" then fail(options, round, "refused without a message") end
    local named = options.names or options.path
    if named and not message:find(named, 1, true) then fail(options, round, "the message does not name '%s': %s", named, message) end
    if type(code) ~= "string" or not code:find "^WANE_E_%u+$" then fail(options, round, "the code is %s: %s", tostring(code), message) end
  end
  return value, seconds
end

--- Runs the test; prints how many inputs were accepted and refused, the longest and the memory taken.
-- @param options table { name, sources = string[] good inputs, try, path = nil | where each input is written, names = nil | what every message
--   must name (default: path), words = nil | string[], spans = nil | { { first, last } } a source: where injuries go, rounds = 10000, seed,
--   seconds = 1 longest allowed, bytes = 64 MiB most memory allowed on top of what the process had, accepted = 1, refused = 1: least of each }
-- @return integer accepted, integer refused
function M.run(options)
  local rounds, sanitized = tonumber(os.getenv "WANE_FUZZ_ROUNDS") or options.rounds or 10000, os.getenv "WANE_SANITIZER"
  local accepted, refused, longest = 0, 0, 0
  collectgarbage()
  forget_peak()
  local rss_peak, heap_peak, rss = memory()
  for round = 1, rounds do
    local value, seconds = attempt(options, round)
    if value then accepted = accepted + 1 else refused = refused + 1 end
    if seconds > longest then longest = seconds end
    if seconds > (options.seconds or 1) and not sanitized then fail(options, round, "took %.2f s", seconds) end
    if round % 1000 == 0 then collectgarbage() end
  end
  local rss_after, heap_after = memory()
  local grown = math.max(rss_after - math.max(rss, rss_peak), heap_after - heap_peak)
  print(("    %d %s: %d accepted, %d refused, the longest %.1f ms, %.1f MB of memory"):format(rounds, options.name, accepted, refused, longest * 1000,
    math.max(0, grown) / 1e6))
  if grown > (options.bytes or 64 * 2 ^ 20) and not sanitized then fail(options, rounds, "took %.1f MB of memory", grown / 1e6) end
  if accepted < (options.accepted or 1) or refused < (options.refused or 1) then
    fail(options, rounds, "%d accepted and %d refused: the injuries miss what they are meant for", accepted, refused)
  end
  return accepted, refused
end

return M
