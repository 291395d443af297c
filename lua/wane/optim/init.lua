--- Optimizers: what changes parameters by their gradients.
--
--     local opt = wane.optim.PagedAdamW8bit(model:trainable_parameters(), { lr = 2e-4 })
--     loss:backward()
--     opt:clip(1.0)                       -- the gradients' global norm is brought down to 1 in the next step
--     opt:step()
--     opt:zero_grad()
--
-- Kinds: AdamW, Adam, SGD, Lion, RMSprop, Adagrad; each as X and X32bit (moments in f32) and X8bit (codes of 8 bits, one scale for every 256
-- values; parameters of fewer than 4096 values keep f32), and PagedX, PagedX8bit, PagedX32bit, whose moments lie in a file, so that the
-- kernel may write them out when memory is short. Formulas and defaults: wane.optim.kinds; the step itself: wane_optimizer_step.
-- @module wane.optim
local core = require "wane.core"
local F = require "wane.nn.functional"
local Tensor = require "wane.tensor"
local kinds = require "wane.optim.kinds"
local C, check, stream = core.C, core.check, core.stream

local M = {}

local SMALLEST_8BIT = 4096               -- values; below, moments stay f32 (bitsandbytes' min_8bit_size)
local SMALLEST_PAGED = 100000            -- values; smaller moments are not worth a mapping (bitsandbytes optimizer.py)

---@class wane.Optimizer
---@field groups table[] { params, lr, betas, eps, weight_decay, momentum, alpha }: lr may be set between steps
---@field kind string
---@field bits integer 32 or 8
---@field paged boolean
local Optimizer = {}
Optimizer.__index = Optimizer

-- ---------------------------------------------------------------- making

local function check_option(kind, key)
  if not kind.options[key] then
    local known = {}
    for name in pairs(kind.options) do known[#known + 1] = name end
    table.sort(known)
    core.raise("optim: %s has no option '%s'; it has %s", kind.name, tostring(key), table.concat(known, ", "))
  end
end

-- Groups from a list of tensors or of groups, each completed with the options given for all.
local function groups_of(kind, params, opts)
  if type(params) ~= "table" or #params == 0 then core.raise "optim: expected a list of parameters or of groups { params = … }, found none" end
  local list = Tensor.is(params[1]) and { { params = params } } or params
  local groups, seen, count = {}, {}, 0
  for i, given in ipairs(list) do
    if type(given) ~= "table" or type(given.params) ~= "table" then core.raise("optim: group %d: expected { params = a list of tensors }", i) end
    local group = { params = given.params }
    for key, default in pairs(kind.options) do group[key] = default end
    for _, source in ipairs { opts, given } do
      for key, value in pairs(source) do
        if key ~= "params" and key ~= "upstream" and key ~= "dir" then
          check_option(kind, key)
          group[key] = value
        end
      end
    end
    for k, p in ipairs(group.params) do
      if not Tensor.is(p) or not p:is_float() then core.raise("optim: group %d: parameter %d is no float tensor", i, k) end
      if seen[p] then core.raise("optim: parameter '%s' is in two groups, or twice in one", tostring(p.name or k)) end
      seen[p] = true
      count = count + 1
      p.name = p.name or ("parameter." .. count)          -- what its state is kept under
    end
    groups[i] = group
  end
  return groups
end

--- Makes an optimizer; wane.optim.AdamW8bit(params, opts) and its siblings call it.
-- @param name string of wane.optim.kinds: "adamw", "lion" …
-- @param bits integer 32 or 8
-- @param paged boolean
-- @param params wane.Tensor[]|table[] parameters, or groups { params = …, lr = …, weight_decay = … }
-- @param opts table|nil the kind's options (lr, betas, eps, weight_decay, momentum, alpha); upstream = true: 8-bit second moments rounded as
--   bitsandbytes rounds them, to 0 too; dir = where paged moments lie (default: TMPDIR, else /tmp)
-- @return wane.Optimizer
function M.new(name, bits, paged, params, opts)
  local kind = kinds[name] or core.raise("optim: there is no optimizer '%s'", tostring(name))
  opts = opts or {}
  local self = setmetatable({ kind = name, bits = bits, paged = paged, upstream = opts.upstream or false, dir = opts.dir or os.getenv "TMPDIR" or "/tmp",
    states = {}, steps = {}, code = kind.code, options = require("ffi").new "wane_optimizer_options" }, Optimizer)
  self.groups = groups_of(kind, params, opts)
  return self
end

local function zeros(self, dtype, n, paged)
  return F.outside_scopes(function()
    local shape, dims = core.shape { n }
    local h = core.handle_type()
    if paged then
      check(C.wane_tensor_new_file(stream(), h, self.dir, dtype, dims, shape))          -- a fresh file is zeros
      return Tensor.wrap(h)
    end
    check(C.wane_tensor_new(stream(), h, dtype, dims, shape))
    local t = Tensor.wrap(h)
    check(C.wane_fill(stream(), h, 0))
    return t
  end)
end

-- The moments of a parameter, all zero: { m = , v = , absmax_m = , absmax_v = }.
local function new_state(self, p)
  local n, kind, state = p:numel(), kinds[self.kind], {}
  local eight, paged = self.bits == 8 and n >= SMALLEST_8BIT, self.paged and n >= SMALLEST_PAGED
  for _, moment in ipairs(kind.moments) do
    state[moment] = zeros(self, eight and C.WANE_U8 or C.WANE_F32, n, paged)
    if eight then
      -- A code of 0 is not a value of 0 in the signed map; beside a scale of 0 it is one.
      state["absmax_" .. moment] = zeros(self, C.WANE_F32, math.ceil(n / 256), false)
    end
  end
  return state
end

-- ---------------------------------------------------------------- stepping

local function handle_of(t) return t and t.h or nil end

--- Changes every parameter that has a gradient.
function Optimizer:step()
  local o = self.options
  o.kind, o.upstream = self.code, self.upstream and 1 or 0
  for _, group in ipairs(self.groups) do
    kinds[self.kind].fill(o, group)
    for _, p in ipairs(group.params) do
      local grad = rawget(p, "grad")
      if grad then
        local state = self.states[p] or new_state(self, p)
        self.states[p], self.steps[p] = state, (self.steps[p] or 0) + 1
        o.step = self.steps[p]
        check(C.wane_optimizer_step(stream(), p.h, grad.h, handle_of(state.m), handle_of(state.v), handle_of(state.absmax_m), handle_of(state.absmax_v),
          handle_of(self.factor), o))
      end
    end
  end
  if self.factor then self.factor:close() end
  self.factor = nil
end

--- Lets all gradients go.
function Optimizer:zero_grad()
  for _, group in ipairs(self.groups) do
    for _, p in ipairs(group.params) do
      local grad = rawget(p, "grad")
      if grad then grad:close() end
      p.grad = nil
    end
  end
end

-- The gradients' norm over all parameters, f32 [1].
local function norm_of(grads)
  local norms = {}
  for i, g in ipairs(grads) do
    local h = core.handle_type()
    check(C.wane_reduce(stream(), h, g.h, C.WANE_NORM2, -1, 0))
    norms[i] = F.view(Tensor.wrap(h), 1)
  end
  return Tensor.constructors.cat(norms, 1):norm(2)
end

--- Makes the next step use gradients whose global norm is at most `most`: they are multiplied by min(1, most / (norm + 1e-6)), on the device.
-- Source: torch.nn.utils.clip_grad_norm_.
-- @param most number|nil nil or 0: the norm alone, nothing is clipped
-- @return wane.Tensor f32, a single value: the norm before clipping
function Optimizer:clip(most)
  local grads = {}
  for _, group in ipairs(self.groups) do for _, p in ipairs(group.params) do grads[#grads + 1] = rawget(p, "grad") end end
  if #grads == 0 then return Tensor.constructors.zeros(1) end
  local norm = core.scope(norm_of, grads)
  if self.factor then self.factor:close() end
  self.factor = most and most > 0 and F.outside_scopes(core.scope, function()
    local factor = F.binary_scalar(F.binary_scalar(norm, 1e-6, C.WANE_ADD), most, C.WANE_DIV, true)
    return F.view(F.binary_scalar(factor, 1, C.WANE_MIN), 1)
  end) or nil
  return norm
end

-- ---------------------------------------------------------------- keeping

--- Everything that the next step depends on but the parameters: tables of tensors and numbers.
-- @return table { kind, bits, groups = { options }, params = { name = { step, m, v, absmax_m, absmax_v } } }
function Optimizer:state()
  local out = { kind = self.kind, bits = self.bits, groups = {}, params = {} }
  for i, group in ipairs(self.groups) do
    local options = {}
    for key, value in pairs(group) do if key ~= "params" then options[key] = value end end
    out.groups[i] = options
    for _, p in ipairs(group.params) do
      local state = self.states[p]
      if state then
        local entry = { step = self.steps[p] }
        for key, tensor in pairs(state) do entry[key] = tensor end
        out.params[p.name] = entry
      end
    end
  end
  return out
end

--- Writes the state as a safetensors file: tensors under "params.NAME.m" …, numbers in its metadata.
-- @param path string
-- @return true|nil, string|nil message
function Optimizer:save(path)
  return require("wane.serialize").save(path, self:state())
end

local function free(state) for _, tensor in pairs(state) do tensor:close() end end

-- Fresh moments with a saved state's values; nil and why where they do not fit.
local function restored(self, p, saved)
  local state = new_state(self, p)
  for key, tensor in pairs(state) do
    local from, message = saved[key], nil
    if not Tensor.is(from) then message = ("'%s' has no '%s' in the file"):format(p.name, key)
    elseif from:numel() ~= tensor:numel() or from:dtype() ~= tensor:dtype() then
      message = ("'%s': '%s' is %s in the file, expected %s"):format(p.name, key, from:describe(), tensor:describe())
    end
    if message then
      free(state)
      return nil, message
    end
    tensor:copy(from)
  end
  return state
end

--- Reads a state that save wrote. Parameters are found by name. Where something does not fit, nothing is changed.
-- @param path string
-- @return true|nil, string|nil message
function Optimizer:load(path)
  local saved, message, code = require("wane.serialize").load(path)
  if not saved then return nil, message, code end
  if saved.kind ~= self.kind or saved.bits ~= self.bits or #(saved.groups or {}) ~= #self.groups then
    return nil, ("%s: holds the state of %s with %s bits in %d group(s); this is %s with %d bits in %d"):format(path, tostring(saved.kind),
      tostring(saved.bits), #(saved.groups or {}), self.kind, self.bits, #self.groups), "mismatch"
  end
  local left, fresh = {}, {}
  for name in pairs(saved.params or {}) do left[name] = true end
  for _, group in ipairs(self.groups) do
    for _, p in ipairs(group.params) do
      local its = saved.params and saved.params[p.name]
      left[p.name] = nil
      if its and not message then fresh[p], message = restored(self, p, its) end
    end
  end
  local extra = next(left)
  if extra and not message then message = ("holds a state of '%s', which is not trained here"):format(extra) end
  if message then
    for _, state in pairs(fresh) do free(state) end
    return nil, ("%s: %s"):format(path, message), "mismatch"
  end
  for i, group in ipairs(self.groups) do
    for key, value in pairs(saved.groups[i]) do group[key] = value end
  end
  for p, state in pairs(fresh) do
    if self.states[p] then free(self.states[p]) end
    self.states[p], self.steps[p] = state, saved.params[p.name].step
  end
  return true
end

--- Frees the moments.
function Optimizer:close()
  for _, state in pairs(self.states) do free(state) end
  self.states, self.steps = {}, {}
end

--- Bytes that the moments take.
-- @return integer
function Optimizer:nbytes()
  local n = 0
  for _, state in pairs(self.states) do for _, tensor in pairs(state) do n = n + tensor:nbytes() end end
  return n
end

-- ---------------------------------------------------------------- names

local spelled = { AdamW = "adamw", Adam = "adam", SGD = "sgd", Lion = "lion", RMSprop = "rmsprop", Adagrad = "adagrad" }
for class, name in pairs(spelled) do
  for suffix, bits in pairs { [""] = 32, ["32bit"] = 32, ["8bit"] = 8 } do
    M[class .. suffix] = function(params, opts) return M.new(name, bits, false, params, opts) end
    M["Paged" .. class .. suffix] = function(params, opts) return M.new(name, bits, true, params, opts) end
  end
end

--- An optimizer by the name that transformers' Trainer gives it: adamw, adamw_torch, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit,
-- adamw_bnb_8bit, lion_8bit, sgd, rmsprop_8bit …
-- @param name string
-- @return function|nil (params, opts) -> wane.Optimizer, string its one name among those that mean the same, or message
function M.by_name(name)
  local rest = tostring(name):lower()
  local paged = rest:match "^paged_(.*)$"
  rest = paged or rest
  local eight = rest:match "^(.*)_8bit$"
  rest = eight or rest:match "^(.*)_32bit$" or rest
  rest = rest:gsub("_torch_fused$", ""):gsub("_torch$", ""):gsub("_hf$", ""):gsub("_bnb$", "")
  if not kinds[rest] then
    return nil, ("there is no optimizer '%s': [paged_]adamw, adam, sgd, lion, rmsprop or adagrad, with _8bit or _32bit behind"):format(tostring(name))
  end
  local function make(params, opts) return M.new(rest, eight and 8 or 32, paged ~= nil, params, opts) end
  return make, (paged and "paged_" or "") .. rest .. (eight and "_8bit" or "")
end

return M
