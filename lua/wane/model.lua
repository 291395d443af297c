--- A model: the module tree of a family with its values, and what users do with it.
-- @module wane.model
local ffi = require "ffi"
local core = require "wane.core"
local Tensor = require "wane.tensor"
local F = require "wane.nn.functional"
local module = require "wane.nn.module"
local passes = require "wane.nn.pass"
local C = core.C

---@class wane.Model : wane.Module
---@field config table what config.json says, completed
---@field family table
---@field generation_config table defaults of generate()
---@field path string|nil
local Model = setmetatable({ __call = module.Module.__call, __tostring = module.Module.__tostring }, { __index = module.Module })
Model.__index = Model

--- Makes a module tree a model.
-- @param tree wane.Module from wane.models.build
function Model.new(tree)
  tree.generation_config = tree.generation_config or {}
  return setmetatable(tree, Model)
end

-- ---------------------------------------------------------------- inputs

--- Lists of ids as a device tensor i32 [B, T].
local function ids_tensor(lists)
  if Tensor.is(lists) then
    local shape = lists:shape()
    if #shape ~= 2 then core.raise("ids: expected [batch, time], found %d dimension(s)", #shape) end
    return lists, shape[1], shape[2]
  end
  if type(lists) ~= "table" then core.raise("ids: expected a list of lists of token ids, found a %s", type(lists)) end
  if type(lists[1]) == "number" then lists = { lists } end
  local batch, time = #lists, type(lists[1]) == "table" and #lists[1] or 0
  if time == 0 then core.raise "ids: there is no token: expected lists of at least one id" end
  local data = ffi.new("int32_t[?]", math.max(batch * time, 1))
  for b = 1, batch do
    if #lists[b] ~= time then core.raise("ids: row 1 has %d ids, row %d has %d: pad them and give attention_mask", time, b, #lists[b]) end
    for t = 1, time do data[(b - 1) * time + t - 1] = lists[b][t] end
  end
  return F.upload(data, C.WANE_I32, batch * time * 4, batch, time), batch, time
end
Model.ids_tensor = ids_tensor

--- Positions and key mask of a mask [B][T] of 0 and 1: position = max(cumulative sum - 1, 0), as transformers' generate() has it.
-- @param mask table lists
-- @param capacity integer|nil width of the key mask; columns behind the mask are 1
-- @return wane.Tensor|nil positions i32 [B, T], wane.Tensor|nil key mask u8 [B, capacity]; nil, nil where nothing is masked
function Model.mask_tensors(mask, batch, time, capacity)
  capacity = capacity or time
  local positions = ffi.new("int32_t[?]", math.max(batch * time, 1))
  local keys = ffi.new("uint8_t[?]", math.max(batch * capacity, 1))
  local any = false
  for b = 0, batch - 1 do
    local row, sum = mask[b + 1], 0
    if #row ~= time then core.raise("attention_mask: row %d has %d entries, ids have %d", b + 1, #row, time) end
    for t = 0, capacity - 1 do
      local on = t >= time or row[t + 1] ~= 0
      keys[b * capacity + t] = on and 1 or 0
      if t < time then
        if on then sum = sum + 1 else any = true end
        positions[b * time + t] = math.max(sum - 1, 0)
      end
    end
  end
  if not any then return nil, nil end
  return F.upload(positions, C.WANE_I32, batch * time * 4, batch, time), F.upload(keys, C.WANE_U8, batch * capacity, batch, capacity)
end

-- ---------------------------------------------------------------- forward

--- Scores of every vocabulary entry: the head over the backbone's result x [B, T, hidden].
function Model:head(x) return self:find(self.family.head)(x) end

--- Logits of whole sequences.
-- @param ids integer[][]|wane.Tensor [batch, time]
-- @param opts table|nil { attention_mask = lists of 0 and 1, last = only this many last positions }
-- @return wane.Tensor f32 [batch, time, vocab]
function Model:forward(ids, opts)
  opts = opts or {}
  return core.scope(function()
    local tensor, batch, time = ids_tensor(ids)
    local mask = opts.attention_mask
    if Tensor.is(mask) then mask = mask:totable() end
    local positions, key_mask
    if mask then positions, key_mask = Model.mask_tensors(mask, batch, time) end
    local pass = passes.new { batch = batch, time = time, positions = positions, key_mask = key_mask, tail_rows = opts.last }
    return self:head(self:backbone(tensor, pass))
  end)
end

--- Every Linear with its path.
function Model:linears()
  local list = {}
  for path, m in self:modules() do if m.in_features then list[#list + 1] = { path, m } end end
  return list
end

--- The root's line in the tree: family, size, how it is held.
function Model:describe()
  local n, seen = 0, {}
  for _, m in self:modules() do
    for _, p in ipairs(m:own_parameters()) do
      local count = p.value and not seen[p.value] and 1 or 0
      if p.value then seen[p.value] = true end
      for _, size in ipairs(p.shape) do count = count * size end
      n = n + count
    end
  end
  return ("%s: %.1f M parameters, %.1f MB%s"):format((self.config.architectures or {})[1] or self.family.name, n / 1e6, self:memory_footprint() / 1e6,
    self.compute and ", compute " .. self.compute or "")
end

--- Sets how products are computed: "f32", "bf16", "f16" or "fast"; see wane_linear.
function Model:set_compute(name)
  local code = module.compute_code(name)
  for _, l in ipairs(self:linears()) do l[2].compute = code end
  self.compute = name
  return self
end

--- New token ids for each prompt; see wane.generate.
-- @param prompts integer[][] lists of ids
-- @param opts table|nil transformers' names: max_new_tokens, do_sample, temperature, top_k, top_p, …
-- @return integer[][] new ids of each row
function Model:generate(prompts, opts) return require("wane.generate").generate(self, prompts, opts) end

--- Pieces of text as they are generated: `for piece in model:stream(tok, "Once") do io.write(piece) end`.
-- @param tok wane.Tokenizer
-- @param prompt string|integer[]
-- @param opts table|nil as generate's
function Model:stream(tok, prompt, opts) return require("wane.generate").stream(self, tok, prompt, opts) end

--- Frees every parameter now.
function Model:close()
  for _, m in self:modules() do
    for _, p in ipairs(m:own_parameters()) do
      if p.value then
        p.value:close()
        m[p.name] = nil
      end
    end
  end
end

return Model
