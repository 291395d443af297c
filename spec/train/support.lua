--- What the specs of the training loop share: folders that go at the end, rows that a tiny model can learn, the model, a run's options.
local busted = require "busted"
local cjson = require "cjson"
local data = require "wane.train.data"
local golden = require "spec.support.golden"
local lora = require "wane.lora"
local wane = require "wane"

local M = {}
local folders = {}

--- A new folder; it is removed when all specs have run.
function M.folder()
  local dir = os.tmpname()
  os.remove(dir)
  folders[#folders + 1] = dir
  os.execute("mkdir -p " .. dir)
  return dir
end
busted.subscribe({ "suite", "end" }, function()
  for _, dir in ipairs(folders) do os.execute("rm -rf " .. dir) end
  return nil, true
end)

--- Writes a text file; its path.
function M.write(path, text)
  local f = assert(io.open(path, "w"))
  f:write(text)
  f:close()
  return path
end

--- A file of n rows of ids that a tiny model can learn: runs of numbers.
function M.rows_file(n)
  local out = {}
  for i = 1, n do
    local ids = {}
    for t = 1, 5 + i % 4 do ids[t] = 3 + (i * 5 + t) % 40 end
    out[i] = cjson.encode { input_ids = ids }
  end
  return M.write(M.folder() .. "/rows.jsonl", table.concat(out, "\n"))
end

M.rows_path = M.rows_file(40)

--- Its rows.
function M.open(max_length) return assert(data.open(M.rows_path, nil, { max_length = max_length })) end

--- The golden llama with a fresh adapter. o: { dropout = 0.1, quant }.
function M.adapted(o)
  o = o or {}
  local model = assert(wane.load(golden.root .. "llama", { tokenizer = false, compute = "f32", quant = o.quant }))
  lora.attach(model, { r = 4, alpha = 8, dropout = o.dropout or 0.1, target_modules = "all-linear", seed = 3 })
  return model
end

--- What a model trains, as lists of numbers by name.
function M.values(model)
  local out = {}
  for _, p in ipairs(model:trainable_parameters()) do out[p.name] = p:totable() end
  return out
end

local settings = { lr = 1e-2, batch_size = 4, accumulate = 2, max_steps = 12, warmup_steps = 2, optim = "adamw_8bit", seed = 5 }

--- A run's options: small ones, and these.
function M.with(more)
  local o = {}
  for _, source in ipairs { settings, more } do for key, value in pairs(source) do o[key] = value end end
  return o
end

return M
