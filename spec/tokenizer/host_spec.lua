-- In a host's event loop: opening a vocabulary of 256k tokens with 500k merges, and encoding a long text, do their work elsewhere.
local support = require "support.text"
local tokenizer = require "wane.tokenizer"
local core = require "wane.core"
local uv = require "luv"

--- Writes a tokenizer.json: strings over 32 letters, up to three splits each as merges.
local function write_large(path, tokens, merges)
  local letters, f = {}, assert(io.open(path, "wb"))
  for i = 0, 31 do letters[i] = string.char(65 + i) end
  letters[27] = "z"                                    -- the backslash would need escaping
  local function word(n)                               -- 1 to 4 letters, all different
    local s = ""
    repeat s = letters[n % 32] .. s n = math.floor(n / 32) - 1 until n < 0
    return s
  end
  f:write '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{'
  for i = 0, tokens - 1 do f:write(i > 0 and "," or "", '"', word(i), '":', i) end
  f:write '},"merges":['
  local n, i = 0, 32
  while n < merges do
    local w = word(i)
    for cut = 1, #w - 1 do
      if n < merges then
        f:write(n > 0 and "," or "", '["', w:sub(1, cut), '","', w:sub(cut + 1), '"]')
        n = n + 1
      end
    end
    i = i + 1
  end
  f:write "]}}"
  f:close()
end

--- Runs fn in a coroutine whose waiting is the loop's: what fn returns, the longest time it held the loop, and in all, in seconds.
local function in_loop(fn)
  local longest, results = 0, nil
  local co
  local function resume(...)
    local started = core.C.wane_clock()
    local ok, a, b = coroutine.resume(co, ...)
    longest = math.max(longest, core.C.wane_clock() - started)
    if not ok then error(a, 0) end
    if coroutine.status(co) == "dead" then results = { a, b } end
  end
  co = coroutine.create(function()
    core.set_waiter(function(fd, over)
      if over() then return end
      local poll = uv.new_poll(fd)
      poll:start("r", function() poll:stop() poll:close() resume() end)
      repeat coroutine.yield() until over()
    end)
    return fn()
  end)
  local started = core.C.wane_clock()
  resume()
  uv.run()
  assert(results, "the coroutine did not end")
  return results[1], longest, core.C.wane_clock() - started
end

describe("tokenizer in a host's loop", function()
  local folder, gone
  setup(function() folder, gone = support.folder() write_large(folder .. "/tokenizer.json", 256000, 500000) end)
  teardown(function() gone() end)

  it("opens 256k tokens and 500k merges without holding it", function()
    local best, seconds = math.huge, 0
    for _ = 1, 5 do                                    -- the machine is shared: the best of five
      local tok, longest, all = in_loop(function() return assert(tokenizer.load(folder)) end)
      assert.equal(256000, tok.vocab_size)
      if longest < best then best, seconds = longest, all end
      tok:close()
    end
    print(("    opened in %.0f ms, the loop held for %.2f ms at most"):format(seconds * 1000, best * 1000))
    assert.is_true(best < 0.005)
  end)

  it("encodes 4 MB without holding it while it works", function()
    local tok = assert(tokenizer.load(folder))
    local text = ("THE QUICK BROWN FOX JUMPS "):rep(160000)
    local ids, longest, all = in_loop(function() return tok:encode(text) end)
    print(("    %.1f MB in %.0f ms, the loop held for %.1f ms, %d ids"):format(#text / 1e6, all * 1000, longest * 1000, #ids))
    assert.equal(text:gsub(" ", ""), (tok:decode(ids):gsub(" ", "")))
    -- What is left on the calling thread is the copy of the text and the list of ids.
    assert.is_true(longest < all / 2)
  end)

  it("a load that is given up ends", function()
    local ffi = require "ffi"
    local job = ffi.new "wane_job *[1]"
    assert.equal(0, core.C.wane_tokenizer_open(job, folder .. "/tokenizer.json", nil))
    core.C.wane_job_cancel(job[0])
    assert.equal(core.C.WANE_E_CANCELLED, core.C.wane_job_wait(job[0], -1))
    core.C.wane_job_free(job[0])
    assert.equal(0, core.C.wane_tokenizer_open(job, folder .. "/tokenizer.json", nil))
    core.C.wane_job_free(job[0])                       -- running: it cleans up behind itself
  end)
end)
