-- XXH64 against xxHash's own values.
local paths = require "wane.checkpoint.paths"

local function letters(n)
  local out = {}
  for i = 0, n - 1 do out[i + 1] = string.char((i * 7 + math.floor(i / 256)) % 256) end
  return table.concat(out)
end

describe("a checksum", function()
  it("is xxhsum's, of texts of every kind of end", function()
    for text, expected in pairs { [""] = "ef46db3751d8e999", a = "d24ec4f1a98c6e5b", ["Nobody inspects the spammish repetition"] = "fbcea83c8a378bf1" } do
      assert.equal(expected, paths.hash_text(text))
    end
    for n, expected in pairs { [7] = "d734a6b26f3da63e", [31] = "0f187c62b1e722b7", [32] = "91b0cb0931a8c629", [33] = "931b043cf8d65b94",
      [63] = "219110bf13e2fa26", [64] = "bf3052e3445775d0", [101] = "42312f4d55d9bd17",
      [2 ^ 21] = "19f05b11496170a8" } do
      assert.equal(expected, paths.hash_text(letters(n)), n)
    end
  end)

  it("of a file is that of its bytes, read in parts", function()
    local path = os.tmpname()
    for _, n in ipairs { 1, 31, 32, 2 ^ 20, 2 ^ 20 + 1, 2 ^ 21 + 77 } do
      local text, f = letters(n), assert(io.open(path, "wb"))
      f:write(text)
      f:close()
      assert.equal(paths.hash_text(text), paths.hash(path))
    end
    os.remove(path)
    local none, message, code = paths.hash(path)
    assert.is_nil(none)
    assert.matches("cannot open", message)
    assert.equal("WANE_E_IO", code)
  end)
end)
