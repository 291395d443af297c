--- Modules: tables that hold parameters and other modules, have a `forward`, and can be called.
--
-- A module's canonical path is the one transformers gives it ("model.layers.0.mlp.up_proj"): keys of tables joined by dots, list
-- items counted from 0. Children keep the order in which they were made, which is the order of definition.
-- @module wane.nn.module
local core = require "wane.core"
local F = require "wane.nn.functional"

local M = {}

---@class wane.Module
local Module = {}
Module.__index = Module
M.Module = Module

local made = 0
local function number(module)
  made = made + 1
  module.serial = made
  return module
end

--- Runs the module: forward(...), then its hook (if any) sees the result and what went in.
function Module.__call(self, ...)
  local y = self:forward(...)
  local hook = rawget(self, "hook")
  if hook then hook(y, self, ...) end
  return y
end

--- x + self(...). A module that ends in a Linear says so, for an addition in the Linear's own op: instead of `forward` it has `ending`, that
-- child's name, and `inner`, which makes what goes into it. A hook sees the module's own result: then the addition comes after.
function Module:added_to(x, ...)
  local ending = rawget(self, "ending")
  local last = ending and self[ending]
  if not last or rawget(self, "hook") or not M.is(last) then return F.add(x, self(...)) end
  return last:added_to(x, self:inner(...))
end

local function forward_to_ending(self, ...) return self[self.ending](self:inner(...)) end

--- A class of modules with parameters: `local Linear = module.class "Linear"`; instances come from `class.new`.
-- @param name string shown in the tree
function M.class(name)
  local class = setmetatable({ type_name = name, __call = Module.__call, __tostring = Module.__tostring }, { __index = Module })
  class.__index = class
  return class
end

--- Makes `self` an instance of `class`. params: list of { name, sizes… } declared parameters.
function M.instance(class, self) return number(setmetatable(self, class)) end

--- A module from a table of children and functions, `forward` or `ending` and `inner` (Module:added_to) among them.
-- @param fields table
function M.module(fields)
  if fields.ending then fields.forward = forward_to_ending end
  return number(setmetatable(fields, Module))
end

--- A module that holds `count` modules build(i, ...), i counting from 0.
function M.list(count, build, ...)
  local list = number(setmetatable({ is_list = true }, Module))
  for i = 1, count do list[i] = build(i - 1, ...) end
  return list
end

--- True for modules.
function M.is(x)
  return type(x) == "table" and type(rawget(x, "serial")) == "number" and getmetatable(x) ~= nil
end

--- Children in order of definition: a list of { name, module }.
function Module:children()
  local found = {}
  for key, value in pairs(self) do
    if M.is(value) then found[#found + 1] = { type(key) == "number" and tostring(key - 1) or key, value } end
  end
  table.sort(found, function(a, b) return a[2].serial < b[2].serial end)
  return found
end

local function walk(module, path, visit)
  visit(path, module)
  for _, child in ipairs(module:children()) do
    walk(child[2], path == "" and child[1] or path .. "." .. child[1], visit)
  end
end

--- Every module with its path, the root ("") first: `for path, module in model:modules() do`.
function Module:modules()
  local paths, modules, i = {}, {}, 0
  walk(self, "", function(path, module) paths[#paths + 1], modules[#modules + 1] = path, module end)
  return function()
    i = i + 1
    return paths[i], modules[i]
  end
end

--- The module at a path ("model.layers.0.mlp"), or nil.
-- @param path string
function Module:find(path)
  local at = self
  for key in path:gmatch "[^.]+" do
    local index = tonumber(key)
    at = rawget(at, index and rawget(at, "is_list") and index + 1 or key)
    if not M.is(at) then return nil end
  end
  return at
end

--- Declared parameters of this module alone: a list of { name = , shape = , value = Tensor or nil }.
function Module:own_parameters()
  local list = {}
  for _, p in ipairs(rawget(self, "params") or {}) do list[#list + 1] = { name = p.name, shape = p.shape, value = rawget(self, p.name) } end
  return list
end

--- Every parameter with its path: `for path, tensor in model:parameters() do`. Tied ones appear under each of their names.
function Module:parameters()
  local paths, tensors, i = {}, {}, 0
  for path, module in self:modules() do
    for _, p in ipairs(module:own_parameters()) do
      if p.value then paths[#paths + 1], tensors[#tensors + 1] = (path == "" and "" or path .. ".") .. p.name, p.value end
    end
  end
  return function()
    i = i + 1
    return paths[i], tensors[i]
  end
end

-- Bytes of a parameter as transformers counts them: without the scales of 4-bit and int8 weights, in the dtype of the file.
local function upstream_bytes(t, stored, info)
  local dtype = t:dtype()
  if dtype == "nf4" or dtype == "fp4" or dtype == "int8" then
    local n = tonumber(info.numel)
    return dtype == "int8" and n or math.ceil(n / 2)
  end
  return stored and tonumber(core.C.wane_dtype_bytes(core.dtype(stored), info.numel)) or tonumber(info.nbytes)
end

--- Bytes that the parameters hold (tied ones once): all parts of quantized weights, scales included. With "transformers", what its
-- get_memory_footprint() says of the same model: scales left out, the file's dtypes, rotary buffers counted twice.
-- @param convention string|nil "transformers"
-- @return integer bytes
function Module:memory_footprint(convention)
  if convention and convention ~= "transformers" then core.raise("memory_footprint: expected nothing or 'transformers', found '%s'", tostring(convention)) end
  local seen, bytes, upstream = {}, 0, 0
  local info = core.info_type()
  for _, module in self:modules() do
    for _, p in ipairs(module:own_parameters()) do
      local t = p.value
      if t and not seen[t] then
        seen[t] = true
        core.check(core.C.wane_tensor_info(t.h, info))
        bytes = bytes + tonumber(info.nbytes)
        upstream = upstream + upstream_bytes(t, module.stored and module.stored[p.name], info)
      end
    end
  end
  if not convention then return bytes end
  local config = self.config or {}
  for _, rotary in pairs { config.rotary, config.local_rotary } do upstream = upstream + math.floor(rotary.dim / 2) * 4 * 2 end
  return upstream
end

--- Calls fn(result, module, inputs…) after each forward of the module at `path`; nil removes it. For looking inside.
function Module:on_forward(path, fn)
  local module = self:find(path)
  if not module then core.raise("there is no module '%s' here; print(model) draws the tree", path) end
  module.hook = fn
end

--- One line about the module itself; classes override it.
function Module:describe() return self.type_name or "" end

-- Equal neighbours of a list are drawn once, as "(0-29): 30 x".
local function shape_key(module)
  local parts = { module:describe() }
  for _, child in ipairs(module:children()) do parts[#parts + 1] = child[1] .. "=" .. shape_key(child[2]) end
  return table.concat(parts, ";")
end

local function draw(module, name, indent, lines)
  lines[#lines + 1] = indent .. (name ~= "" and "(" .. name .. ") " or "") .. module:describe()
  local children, i = module:children(), 1
  while i <= #children do
    local last = i
    if rawget(module, "is_list") then
      local key = shape_key(children[i][2])
      while children[last + 1] and shape_key(children[last + 1][2]) == key do last = last + 1 end
    end
    local label = last > i and ("%s-%s: %d x"):format(children[i][1], children[last][1], last - i + 1) or children[i][1]
    draw(children[i][2], label, indent .. "  ", lines)
    i = last + 1
  end
end

--- The tree, drawn.
function Module:__tostring()
  local lines = {}
  draw(self, "", "", lines)
  return table.concat(lines, "\n")
end

return M
