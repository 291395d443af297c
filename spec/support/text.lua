--- What the tokenizer specs share: fixtures, files, a GGUF writer.
local cjson = require "cjson"
local ffi = require "ffi"

local M = { fixtures = "spec/fixtures/tokenizers/" }
M.kinds = { "gpt2", "gpt_neox", "bloom", "llama3", "qwen2", "llama2", "mistral", "gemma" }

function M.read(path)
  local f = assert(io.open(path, "rb"))
  local text = f:read "*a"
  f:close()
  return text
end

function M.write(path, text)
  local f = assert(io.open(path, "wb"))
  assert(f:write(text))
  f:close()
  return path
end

function M.json(kind, name) return cjson.decode(M.read(M.fixtures .. kind .. "/" .. name)) end

function M.same(a, b)
  if #a ~= #b then return false end
  for i = 1, #a do if a[i] ~= b[i] then return false end end
  return true
end

--- A folder that goes when the spec ends.
function M.folder()
  local path = os.tmpname()
  os.remove(path)
  assert(os.execute("mkdir -p " .. path))
  return path, function() os.execute("rm -rf " .. path) end
end

--- The real model, or nil where it was not fetched.
function M.real_model()
  local path = os.getenv "WANE_DEMO_MODEL" or (os.getenv "WANE_CACHE" or ".cache") .. "/models/SmolLM2-135M-Instruct.Q4_1.gguf"
  local f = io.open(path, "rb")
  if f then f:close() return path end
end

local function raw(kind, value)
  local box = ffi.new(kind .. "[1]", value)
  return ffi.string(box, ffi.sizeof(box))
end

local function text(s) return raw("uint64_t", #s) .. s end

local writers = {
  string = function(v) return raw("uint32_t", 8) .. text(v) end,
  boolean = function(v) return raw("uint32_t", 7) .. raw("uint8_t", v and 1 or 0) end,
  number = function(v) return raw("uint32_t", 4) .. raw("uint32_t", v) end,
  table = function(v)
    local types = { string = 8, int = 5, float = 6 }
    local out = { raw("uint32_t", 9), raw("uint32_t", types[v.type]), raw("uint64_t", #v) }
    for _, x in ipairs(v) do
      out[#out + 1] = v.type == "string" and text(x) or raw(v.type == "int" and "int32_t" or "float", x)
    end
    return table.concat(out)
  end,
}

--- The bytes of a GGUF file that holds metadata alone. Values: string, boolean, number (u32), {type = "string"|"int"|"float", …}.
-- @param pairs_ table list of {key, value}
function M.gguf(pairs_)
  local out = { "GGUF", raw("uint32_t", 3), raw("uint64_t", 0), raw("uint64_t", #pairs_) }
  for _, p in ipairs(pairs_) do out[#out + 1] = text(p[1]) .. writers[type(p[2])](p[2]) end
  return table.concat(out)
end

return M
