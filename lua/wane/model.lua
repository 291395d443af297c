--- A model: the module tree of a family with its values, and what users do with it.
-- @module wane.model
local ffi = require "ffi"
local autograd = require "wane.autograd"
local core = require "wane.core"
local Tensor = require "wane.tensor"
local F = require "wane.nn.functional"
local losses = require "wane.loss"
local module = require "wane.nn.module"
local passes = require "wane.nn.pass"
local C = core.C

local IGNORED = losses.IGNORED

---@class wane.Model : wane.Module
---@field config table what config.json says, completed
---@field family table
---@field generation_config table defaults of generate()
---@field path string|nil
---@field warnings string[] what the load did that its caller may not have meant
---@field report table { missing = string[], unexpected = string[] }: tensors of the model that the files lack, and the other way round
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
-- @param what string|nil what messages call them (ids)
local function ids_tensor(lists, what)
  what = what or "ids"
  if Tensor.is(lists) then
    local shape = lists:shape()
    if #shape ~= 2 then core.raise("%s: expected [batch, time], found %d dimension(s)", what, #shape) end
    return lists, shape[1], shape[2]
  end
  if type(lists) ~= "table" then core.raise("%s: expected a list of lists of token ids, found a %s", what, type(lists)) end
  if type(lists[1]) == "number" then lists = { lists } end
  local batch, time = #lists, type(lists[1]) == "table" and #lists[1] or 0
  if time == 0 then core.raise("%s: there is no token: expected lists of at least one id", what) end
  local data = ffi.new("int32_t[?]", math.max(batch * time, 1))
  for b = 1, batch do
    if #lists[b] ~= time then core.raise("%s: row 1 has %d ids, row %d has %d: pad them and give a mask", what, time, b, #lists[b]) end
    for t = 1, time do data[(b - 1) * time + t - 1] = lists[b][t] end
  end
  return F.upload(data, C.WANE_I32, batch * time * 4, batch, time), batch, time
end
Model.ids_tensor = ids_tensor

--- Positions and key mask of a mask [B][T] of 0 and 1: position = max(cumulative sum - 1, 0), as transformers' generate() has it.
-- @param mask table|wane.Tensor|nil lists; nil: nothing is masked
-- @param capacity integer|nil width of the key mask; columns behind the mask are 1
-- @return wane.Tensor|nil positions i32 [B, T], wane.Tensor|nil key mask u8 [B, capacity]; nil, nil where nothing is masked
function Model.mask_tensors(mask, batch, time, capacity)
  if not mask then return nil, nil end
  if Tensor.is(mask) then mask = mask:totable() end
  if #mask ~= batch then core.raise("attention_mask: expected %d row(s), one a row of ids, found %d", batch, #mask) end
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

-- Activations of a recorded pass: 16 bits where products are, as upstream's are.
local function activations(self) return autograd.recording and self.compute == "bf16" and C.WANE_BF16 or C.WANE_F32 end

--- Runs the encoder of an encoder-decoder.
-- @param ids integer[][]|wane.Tensor [batch, time] what it reads
-- @param mask table|wane.Tensor|nil of 0 and 1; padding may stand on either side
-- @return wane.Pass the encoder's pass with its result in `states` [batch, time, hidden]: the `source` of the decoder's passes. close() frees it.
function Model:source(ids, mask)
  return autograd.scope(function()
    local tensor, batch, time = ids_tensor(ids)
    local _, key_mask = Model.mask_tensors(mask, batch, time)
    local pass = passes.new { batch = batch, time = time, key_mask = key_mask, dtype = activations(self), checkpointing = self.checkpointing }
    pass.states = self:encode(tensor, pass)
    return pass
  end)
end

-- A list of lists of integers as a tensor i32 [batch, time], or nil.
local function integers(lists, what, batch, time)
  if not lists then return nil end
  local tensor, b, t = ids_tensor(lists, what)
  if b ~= batch or t ~= time then core.raise("%s: expected [%d, %d] as the ids, found [%d, %d]", what, batch, time, b, t) end
  return tensor
end

-- What enters the head: [batch, time, hidden].
local function hidden(self, ids, opts)
  local source, mask, what = nil, opts.attention_mask, "ids"
  if self.encode then
    source = self:source(ids, mask)
    ids, mask, what = opts.decoder_input_ids, opts.decoder_attention_mask, "decoder_input_ids"
  end
  local tensor, batch, time = ids_tensor(ids, what)
  if source and source.batch ~= batch then core.raise("decoder_input_ids: expected %d row(s), one a row of ids, found %d", source.batch, batch) end
  local positions, key_mask = Model.mask_tensors(mask, batch, time)
  local pass = passes.new { batch = batch, time = time, positions = integers(opts.positions, "positions", batch, time) or positions, key_mask = key_mask,
    first = integers(opts.first, "first", batch, time), tail_rows = opts.last, source = source, dtype = activations(self), checkpointing = self.checkpointing }
  return self:backbone(tensor, pass)
end

--- Logits of whole sequences. An encoder-decoder reads `ids` with its encoder and scores decoder_input_ids.
-- @param ids integer[][]|wane.Tensor [batch, time]
-- @param opts table|nil { attention_mask = lists of 0 and 1, last = only this many last positions, positions = lists of integers (from 0),
--   first = for each position the first one (from 0) that it sees: samples packed into a row;
--   encoder-decoder: decoder_input_ids = [batch, T], decoder_attention_mask }
-- @return wane.Tensor f32 [batch, time (encoder-decoder: T), vocab]
function Model:forward(ids, opts)
  opts = opts or {}
  if self.encode and not opts.decoder_input_ids then
    core.raise("forward: %s is an encoder-decoder: its encoder reads the ids, and decoder_input_ids (the start token %s and what follows) are missing",
      self.family.name, tostring(self.config.decoder_start_token_id))
  end
  return autograd.scope(function() return self:head(hidden(self, ids, opts)) end)
end

-- "[2, 3]" of lists or a Tensor, for messages; lists of several lengths: "[2, 3 to 5]".
local function shape_text(x)
  if Tensor.is(x) then return ("[%s]"):format(table.concat(x:shape(), ", ")) end
  local shortest, longest = math.huge, 0
  for _, row in ipairs(x) do shortest, longest = math.min(shortest, #row), math.max(longest, #row) end
  if #x == 0 then return "[0]" end
  return shortest == longest and ("[%d, %d]"):format(#x, longest) or ("[%d, %d to %d]"):format(#x, shortest, longest)
end

-- A label stands for each id; an encoder-decoder's labels have a length of their own. Told here: below, labels are one long list.
local function check_shapes(ids, labels, own_length)
  if not Tensor.is(ids) and type(ids) ~= "table" then return end               -- ids_tensor says what was expected
  if type(ids[1]) == "number" then ids = { ids } end
  local a, b = shape_text(ids), shape_text(labels)
  local rows, other_rows = a:match "^%[%d+", b:match "^%[%d+"
  if rows ~= other_rows or not own_length and a ~= b then
    core.raise("loss: ids are %s, labels are %s: expected %s", a, b, own_length and "as many rows" or "a label for each id (-100: not scored)")
  end
end

-- What the decoder of an encoder-decoder reads for its labels: the start token, then all but the last; an ignored one becomes pad.
-- Source: modeling_t5.py _shift_right.
local function shift_right(labels, start, pad)
  local out = {}
  for b, row in ipairs(labels) do
    out[b] = { start }
    for t = 2, #row do out[b][t] = row[t - 1] == IGNORED and pad or row[t - 1] end
  end
  return out
end

-- What each position of a decoder-only model is asked for: the label behind it.
local function shift_left(labels)
  local out = {}
  for b, row in ipairs(labels) do
    out[b] = {}
    for t = 1, #row do out[b][t] = row[t + 1] or IGNORED end
  end
  return out
end

--- Mean of -log p over the labels that are not -100, as transformers computes it: a decoder-only model is asked at position t for label
-- t + 1; an encoder-decoder reads `ids` with its encoder and the labels behind the start token with its decoder. Where the model trains
-- something (leaves, adapters) and no_grad does not forbid it, the result has a graph: `loss:backward()`.
-- @param ids integer[][] [batch, time]
-- @param labels integer[][] [batch, time]; encoder-decoder: [batch, T]
-- @param opts table|nil { attention_mask, decoder_attention_mask, positions, first (see forward),
--   count = what the sum is divided by: the labels of all micro-batches of an update; default: those of this one }
-- @return wane.Tensor f32 [1]
function Model:loss(ids, labels, opts)
  local o = {}
  for key, value in pairs(opts or {}) do o[key] = value end
  if type(labels) ~= "table" or Tensor.is(labels) then
    core.raise("loss: labels: expected lists of ids, found a %s", Tensor.is(labels) and "Tensor (its totable() makes lists)" or type(labels))
  end
  if type(labels[1]) == "number" then labels = { labels } end
  check_shapes(ids, labels, self.encode ~= nil)
  local targets = labels
  if self.encode then
    if not self.config.decoder_start_token_id then core.raise "loss: the model's config says no decoder_start_token_id (T5: the pad token's id)" end
    o.decoder_input_ids = shift_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)
  else
    targets = shift_left(labels)
  end
  local counted = 0
  for _, row in ipairs(targets) do for _, id in ipairs(row) do if id ~= IGNORED then counted = counted + 1 end end end
  if counted == 0 and not o.count then core.raise "loss: there is no label: all are -100" end
  local function compute()
    local x = hidden(self, ids, o)
    local wanted, batch, time = ids_tensor(targets, "labels")
    return losses.cross_entropy(self, F.view(x, batch * time, -1), F.view(wanted, batch * time), 1 / (o.count or counted))
  end
  if autograd.allowed() and self:trains() then return autograd.record(compute) end
  return core.scope(compute)
end

-- ---------------------------------------------------------------- what is trained

-- Calls fn(tensor, name) for every leaf of the model, in the order of the tree; adapters' behind their module's own.
local function each_leaf(self, fn)
  local seen = {}
  local function visit(tensor, name)
    if tensor and tensor.requires_grad and not seen[tensor] then
      seen[tensor] = true
      fn(tensor, name)
    end
  end
  for path, m in self:modules() do
    local prefix = path == "" and "" or path .. "."
    for _, p in ipairs(m:own_parameters()) do visit(p.value, prefix .. p.name) end
    for _, part in ipairs(rawget(m, "adapters") or {}) do
      for _, field in ipairs { "A", "B", "bias", "magnitude" } do visit(part[field], ("%slora_%s.%s"):format(prefix, field, part.name)) end
    end
  end
end

--- Does the model have leaves: adapters that were attached to be trained, or parameters of its own?
-- @return boolean
function Model:trains()
  local any = false
  each_leaf(self, function() any = true end)
  return any
end

--- The tensors that an optimizer changes, each with its path in `name`, in the order of the tree.
-- @return wane.Tensor[]
function Model:trainable_parameters()
  local list = {}
  each_leaf(self, function(tensor, name)
    tensor.name = name
    list[#list + 1] = tensor
  end)
  return list
end

--- Puts a tensor where another one stands, under each of its names (tied ones have several).
-- @param old wane.Tensor
-- @param new wane.Tensor
function Model:replace_parameter(old, new)
  for _, m in self:modules() do
    for _, p in ipairs(m:own_parameters()) do if p.value == old then m[p.name] = new end end
  end
end

--- Makes parameters of the model itself leaves, as f32 copies: float ones whose path matches. Quantized ones cannot be trained.
-- @param wanted string|function a Lua pattern of paths ("norm"), "1-d" for vectors alone (norms and biases: the GPT-J 8-bit recipe), or
--   function(path, tensor) -> boolean
-- @return integer how many were chosen; 0 changes nothing
function Model:train_parameters(wanted)
  local function matches(path, tensor)
    if type(wanted) == "function" then return wanted(path, tensor) end
    if wanted == "1-d" then return tensor:dim() == 1 end
    return path:find(wanted) ~= nil
  end
  local adapters = rawget(self, "lora")
  if adapters and #adapters.active > 0 then
    core.raise "train_parameters: an adapter is attached already: choose parameters first, and lora.attach takes them into it"
  end
  local chosen, order = {}, {}
  for path, tensor in self:parameters() do
    if not chosen[tensor] and matches(path, tensor) then
      if tensor:is_float() then
        chosen[tensor] = true
        order[#order + 1] = tensor
      elseif type(wanted) ~= "function" and wanted ~= "1-d" then
        core.raise("train_parameters: '%s' is %s, which cannot be trained: expected f32, f16 or bf16", path, tensor:dtype())
      end
    end
  end
  for _, old in ipairs(order) do
    local new = F.outside_scopes(F.cast, old, C.WANE_F32)
    self:replace_parameter(old, new)
    old:close()
    autograd.leaf(new)
  end
  return #order
end

--- No parameter of the model itself is a leaf any more; adapters stay what they are.
function Model:freeze()
  for _, tensor in self:parameters() do tensor.requires_grad, tensor.grad = nil, nil end
end

--- Recomputes layers in backward instead of keeping what is inside them: memory for about a third more time. Gradients are the same bits.
-- @param on boolean
-- @return wane.Model self
function Model:checkpoint_layers(on)
  self.checkpointing = on or nil
  return self
end

--- How many tokens a sequence may have: the size of a table of learned positions (GPT-2, GPT-Neo, OPT), nil for a model without one.
-- @return integer|nil
function Model:learned_positions()
  for _, m in self:modules() do if m.type_name == "PositionEmbedding" then return m.count end end
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
  for _, m in self:modules() do if m.scale then m.compute = code end end           -- a scaled embedding rounds its scale as products do
  for _, l in ipairs(self:linears()) do
    l[2].compute = code
    -- What upstream keeps in float32 (T5's wo, whose products leave 16 bits) is exact here too, unless it was quantized on request.
    for _, kept in ipairs(self.family.keep or {}) do
      if l[1]:match "[^.]+$" == kept and l[2].weight:dtype():match "^b?f%d" then l[2].compute = C.WANE_COMPUTE_F32 end
    end
  end
  self.compute = name
  return self
end

--- New token ids for each prompt; see wane.generate. An encoder-decoder reads the prompts with its encoder.
-- @param prompts integer[][] lists of ids
-- @param opts table|nil transformers' names: max_new_tokens, do_sample, temperature, top_k, top_p, …
-- @return integer[][] new ids of each row
function Model:generate(prompts, opts) return require("wane.generate").generate(self, prompts, opts) end

--- Pieces of text as they are generated: `for piece in model:stream(tok, "Once") do io.write(piece) end`.
-- @param tok wane.Tokenizer
-- @param prompt string|integer[]
-- @param opts table|nil as generate's
function Model:stream(tok, prompt, opts) return require("wane.generate").stream(self, tok, prompt, opts) end

--- Writes the model as a folder that transformers, and wane, load: safetensors under the format's names, sharded where large; config,
-- generation_config and tokenizer beside them. Quantized layers are written in bitsandbytes' layout. The folder appears whole.
-- @param dir string made if it is not there; the model's own folder is allowed
-- @param opts table|nil { dtype = "f32" | "f16" | "bf16" of what is not quantized (default: as stored; GGUF blocks become exact f32),
--   max_shard_bytes = 5e9, progress = function(bytes_done, bytes_total, tensors_done) }
-- @return table|nil { bytes, tensors, shards, upstream = nil | why transformers cannot load it, tokenizer_error }, string|nil message, string|nil code
function Model:save(dir, opts) return require("wane.checkpoint.save").save(self, dir, opts) end

--- Frees every parameter now, adapters included.
function Model:close()
  local adapters = rawget(self, "lora")
  if adapters then adapters:close(self) end
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
