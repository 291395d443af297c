-- Damaged files: bytes changed, cut out, doubled. Each loads or gives a message; what loads encodes and decodes. Never a crash, never a hang.
local support = require "support.text"
local tokenizer = require "wane.tokenizer"
local core = require "wane.core"
local cjson = require "cjson"

local ROUNDS = 1000               -- of each format
local TEXT = "Hello  world, 1234 it's <s> é日本😀\n\n end"

--- One to three small injuries.
local function damage(bytes, random)
  for _ = 1, random(3) do
    local at, kind = random(#bytes), random(10)
    local span = random(40)
    if kind == 1 then bytes = bytes:sub(1, at - 1) .. string.char(random(256) - 1) .. bytes:sub(at + 1)
    elseif kind > 6 then bytes = bytes:sub(1, at - 1) .. string.char(32 + random(94)) .. bytes:sub(at + 1)
    elseif kind == 2 then bytes = bytes:sub(1, at - 1) .. bytes:sub(at + span)
    elseif kind == 3 then bytes = bytes:sub(1, at) .. bytes:sub(at, at + span) .. bytes:sub(at + 1)
    elseif kind == 4 then bytes = bytes:sub(1, at)
    elseif kind == 5 then bytes = bytes:sub(1, at - 1) .. ("\255"):rep(8) .. bytes:sub(at + 8)
    else
      local words = { "{", "}", "[", "]", ",", ":", "null", "true", "-1", "1e9", '"', '""', "99999999", "\\u0000", "{}", "\0" }
      bytes = bytes:sub(1, at - 1) .. words[random(#words)] .. bytes:sub(at + 1)
    end
    if bytes == "" then return bytes end
  end
  return bytes
end

describe("tokenizer, damaged files", function()
  local folder, gone
  setup(function() folder, gone = support.folder() end)
  teardown(function() gone() end)

  local function rounds(name, sources, file)
    it(("%d %s"):format(ROUNDS, name), function()
      local loaded, refused, seed = 0, 0, 7
      local function random(n)                     -- the same everywhere: math.random is the C library's in plain Lua
        seed = (seed * 16807) % 2147483647
        return seed % n + 1
      end
      local longest = 0
      for round = 1, ROUNDS do
        local path = support.write(folder .. "/" .. file, damage(sources[round % #sources + 1], random))
        local started = core.C.wane_clock()
        local tok, message, code = tokenizer.load(path)
        if tok then
          loaded = loaded + 1
          local ok, ids = pcall(tok.encode, tok, TEXT)
          if ok then tok:decode(ids) else assert.is_string(ids) end
          tok:close()
        else
          refused = refused + 1
          assert.is_true(type(message) == "string" and #message > 0)
          assert.matches("^WANE_E_%u+$", code)
        end
        longest = math.max(longest, core.C.wane_clock() - started)
      end
      print(("    %s: %d loaded, %d refused, the longest took %.0f ms"):format(name, loaded, refused, longest * 1000))
      assert.is_true(loaded > 10 and refused > 100)
      assert.is_true(longest < 10)
    end)
  end

  local json, heads = {}, {}
  for i, kind in ipairs { "gpt2", "llama2", "bloom", "mistral" } do
    json[i] = support.read(support.fixtures .. kind .. "/tokenizer.json")
    -- Without most of the vocabulary the injuries hit the settings.
    local small = cjson.decode(json[i])
    small.model.vocab, small.model.merges = { a = 0, ["<s>"] = 1, b = 2, ab = 3, ["<unk>"] = 4, ["</s>"] = 5 }, { { "a", "b" } }
    heads[i] = cjson.encode(small)
  end
  rounds("tokenizer.json files", { json[1], heads[1], heads[2], json[2], heads[3], heads[4] }, "tokenizer.json")

  local function gguf(model, extra)
    local list = {
      { "general.architecture", "llama" }, { "tokenizer.ggml.model", model }, { "tokenizer.ggml.pre", "llama-bpe" },
      { "tokenizer.ggml.tokens", { type = "string", "a", "b", "ab", "<s>", "</s>", "Ġ", "▁", "<0x0A>", "<unk>", "" } },
      { "tokenizer.ggml.token_type", { type = "int", 1, 1, 1, 3, 3, 1, 1, 6, 2, 5 } }, { "tokenizer.ggml.bos_token_id", 3 },
      { "tokenizer.ggml.eos_token_id", 4 }, { "tokenizer.ggml.add_bos_token", true }, { "tokenizer.chat_template", "{{ x }}" },
    }
    list[#list + 1] = extra
    return support.gguf(list)
  end
  rounds("GGUF files", {
    gguf("gpt2", { "tokenizer.ggml.merges", { type = "string", "a b" } }),
    gguf("llama", { "tokenizer.ggml.scores", { type = "float", -1, -2, -3, 0, 0, -4, -5, 0, 0, 0 } }),
  }, "x.gguf")
end)
