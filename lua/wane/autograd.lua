--- Reverse-mode differentiation: what was computed from what, run backward (Griewank & Walther 2008, chapter 3).
--
--     autograd.leaf(weight)                                  -- its gradient is wanted
--     local loss = autograd.record(function() return F.mean(F.square(F.linear(x, weight))) end)
--     loss:backward()                                        -- weight.grad
--
-- Recording is off unless asked for: generation pays nothing. `model:loss` records where the model trains something. While recording, an op
-- of wane.nn.functional or a method of wane.Tensor whose inputs lead to a leaf gives its result a node: { serial, name, inputs, backward,
-- ticket }. backward(dy) enqueues C ops and returns one gradient an input (nil for none). Frozen weights are inputs without a node: they
-- cost the product alone. Methods that no gradient passes, and those that work in place, are errors then (wane.autograd.methods).
--
-- A graph keeps its inputs, not copies of them. Where one of them, or a result, is changed in place before its node is taken, backward
-- raises: its last write is newer than the node's ticket.
--
-- backward() takes nodes in falling order of their serial numbers, which is an order in which every result comes before what it was made
-- of. What a node made is freed when it has been taken, so memory falls as the graph unwinds: after backward only the loss and tensors
-- marked with keep() are left. A graph runs backward once.
-- @module wane.autograd
local core = require "wane.core"
local Tensor = require "wane.tensor.object"    -- whose methods need this module
local C, check = core.C, core.check

local M = {}

--- While true, ops of wane.nn.functional note how their results came about.
M.recording = false
--- While true, dropout drops: when recording, and in the first run of what a checkpoint will run again.
M.dropping = false
--- While true, every recorded result and every gradient is looked at, and the first one that is not finite is an error that names its op.
M.anomaly = false

local forbidden = false                       -- inside no_grad
local serial = 0

-- Runs fn with the three switches set, and sets them back whatever happens.
local function with(recording, dropping, no, fn, ...)
  local a, b, c = M.recording, M.dropping, forbidden
  M.recording, M.dropping, forbidden = recording, dropping, no
  local function finish(ok, ...)
    M.recording, M.dropping, forbidden = a, b, c
    if not ok then error((...), 0) end
    return ...
  end
  return finish(pcall(fn, ...))
end

--- Runs fn(...) with recording on, unless no_grad is around it.
-- @return what fn returns
function M.record(fn, ...) return with(not forbidden, not forbidden, forbidden, fn, ...) end

--- Runs fn(...) with recording off, whatever is called in it.
-- @return what fn returns
function M.no_grad(fn, ...) return with(false, false, true, fn, ...) end

--- Runs fn(...) as if no no_grad were around it: for a gradient that a forward takes by itself.
-- @return what fn returns
function M.allow(fn, ...) return with(false, M.dropping, false, fn, ...) end

--- Is recording possible here, or does no_grad forbid it?
-- @return boolean
function M.allowed() return not forbidden end

--- A scope, unless recording: then what fn makes lives as long as the graph.
-- @return what fn returns
function M.scope(fn, ...)
  if M.recording then return fn(...) end
  return core.scope(fn, ...)
end

-- ---------------------------------------------------------------- leaves and nodes

--- Marks a float tensor as one whose gradient is wanted: f32 in `t.grad` after backward, added up over several.
-- @param t wane.Tensor
-- @return wane.Tensor t
function M.leaf(t)
  if not Tensor.is(t) then core.raise("autograd.leaf: expected a Tensor, found a %s", type(t)) end
  if not t:is_float() then core.raise("autograd.leaf: a %s tensor cannot have a gradient: expected f32, f16 or bf16", t:dtype()) end
  t.requires_grad = true
  return t
end

--- Does a gradient flow to t?
-- @param t wane.Tensor|nil
-- @return boolean
function M.needs(t) return t ~= nil and (rawget(t, "requires_grad") or rawget(t, "node")) ~= nil end
local needs = M.needs

local function finite(t)
  local ok = t:isfinite():all()
  return type(ok) == "boolean" and ok or Tensor.is(ok) and ok:item() and true or false
end

local function look(t, format, ...)
  if not t:is_float() or core.scope(finite, t) then return end
  core.raise("autograd: " .. format, ...)
end

--- Notes how `output` came from `inputs` while recording; called by the ops of wane.nn.functional.
-- @param name string of the op, for messages
-- @param output wane.Tensor
-- @param inputs table { n = count, tensors or nil … }: all that backward reads, whether a gradient goes there or not
-- @param backward function(dy) -> a gradient for each input, nil where none is needed
-- @param saved wane.Tensor[]|nil what else was kept for backward, to be freed after it
-- @return wane.Tensor output
function M.push(name, output, inputs, backward, saved)
  for i = 1, inputs.n do
    if needs(inputs[i]) then
      serial = serial + 1
      output.node = { serial = serial, name = name, output = output, inputs = inputs, backward = backward, saved = saved,
        ticket = C.wane_stream_tail(core.stream()) }
      if M.anomaly then
        output.node.traceback = debug.traceback("", 2)
        look(output, "'%s' gave the first value that is not finite; it was called at:%s", name, output.node.traceback)
      end
      break
    end
  end
  return output
end

--- The same values outside the graph: a view without a node, which no gradient passes.
-- @return wane.Tensor
function Tensor:detach()
  local h = core.handle_type()
  check(C.wane_tensor_retain(core.stream(), h, self.h))
  return Tensor.wrap(h)
end

--- Keeps a recorded tensor through backward, which frees the others.
-- @return wane.Tensor self
function Tensor:keep()
  self.kept = true
  return self
end

--- Calls fn(gradient, t) when the gradient of t is known: for a recorded tensor once, complete; for a leaf each time a part comes in.
-- fn must not keep the gradient (clone it). nil removes it.
-- @param t wane.Tensor
-- @param fn function|nil
function M.on_gradient(t, fn) t.gradient_hook = fn end

-- ---------------------------------------------------------------- backward

local function add(a, b)
  local h = core.handle_type()
  check(C.wane_binary(core.stream(), h, a.h, b.h, C.WANE_ADD))
  return Tensor.wrap(h)
end

-- Gradients in flight: several nodes may wait for one and the same tensor.
local uses = {}
local function hold(g) uses[g] = (uses[g] or 0) + 1 end
local function release(g)
  uses[g] = uses[g] - 1
  if uses[g] == 0 then
    uses[g] = nil
    g:close()
  end
end

-- A leaf's gradient outlives every scope.
local function own(fn, ...)
  local s = core.stream()
  local scope = C.wane_scope_swap(s, nil)
  local ok, result = pcall(fn, ...)
  C.wane_scope_swap(s, scope)
  if not ok then error(result, 0) end
  return result
end
local function as_f32(g)
  local h = core.handle_type()
  check(C.wane_cast(core.stream(), h, g.h, C.WANE_F32))
  return Tensor.wrap(h)
end

local function to_leaf(leaf, g)
  local hook, grad = rawget(leaf, "gradient_hook"), rawget(leaf, "grad")
  if hook then hook(g, leaf) end
  if grad then check(C.wane_add_into(core.stream(), grad.h, g.h, 1)) else leaf.grad = own(as_f32, g) end
end

local function to_node(node, g)
  if not node.grad then
    node.grad = g
    hold(g)
  else
    local sum = add(node.grad, g)
    release(node.grad)
    node.grad = sum
    hold(sum)
  end
end

--- What a backward returns for an input to whose gradient it added in place.
M.IN_PLACE = {}

--- The gradient of t that came another way so far, if a backward may add its own to it in place: nobody else waits for it or sees its values.
-- A backward that did so returns IN_PLACE for this input.
-- @return wane.Tensor|nil
function M.target(t)
  local node = rawget(t, "node")
  local g = node and node.grad
  if g and uses[g] == 1 and not M.anomaly and C.wane_tensor_sole(g.h) == 1 then return g end
end

local function by_serial(a, b) return a.serial < b.serial end

-- Adds every node that leads to `root` and was not found before to `stack`, which is in rising order of serial numbers. What a checkpoint
-- makes comes last, but for what it reached without being told (an encoder's result).
local function collect(root, stack)
  local found, at = { root }, 0
  root.found = true
  while at < #found do
    at = at + 1
    local inputs = found[at].inputs
    for i = 1, inputs.n do
      local node = inputs[i] and rawget(inputs[i], "node")
      if node and not node.found then
        node.found = true
        found[#found + 1] = node
      end
    end
  end
  table.sort(found, by_serial)
  local late = #stack > 0 and found[1].serial < stack[#stack].serial
  for _, node in ipairs(found) do stack[#stack + 1] = node end
  if late then table.sort(stack, by_serial) end
end

-- Gives the gradients that a node's backward returned to its inputs.
local function distribute(node, dy, ...)
  local inputs = node.inputs
  for i = 1, inputs.n do
    local t, g = inputs[i], (select(i, ...))
    if g and g ~= M.IN_PLACE and needs(t) then
      if M.anomaly then
        look(g, "backward of '%s' gave the first gradient that is not finite (input %d); the op was called at:%s", node.name, i, tostring(node.traceback))
      end
      if rawget(t, "node") then to_node(t.node, g) else to_leaf(t, g) end
    end
  end
  for i = 1, inputs.n do                       -- what nobody waits for: of leaves, and what was not asked for
    local g = (select(i, ...))
    if g and g ~= dy and g ~= M.IN_PLACE and not uses[g] then g:close() end
  end
end

-- Frees what a node made and kept; its inputs belong to nodes of their own.
local function let_go(node)
  for _, t in ipairs(node.saved or {}) do t:close() end
  local output = node.output
  if not rawget(output, "kept") then output:close() end
  output.node, node.output, node.inputs, node.backward, node.saved = nil, nil, nil, nil, nil
end

local info = core.info_type()
local function unchanged(node, t, what)
  -- A tensor that was closed is found by whoever reads it.
  if C.wane_tensor_info(t.h, info) == 0 and info.ticket > node.ticket then
    core.raise("backward: %s of '%s', %s, or what it shares memory with, was changed in place after it was recorded: its gradient would be wrong; "
      .. "change a clone()",
      what, node.name, t:describe())
  end
end

local function check_unchanged(node)
  unchanged(node, node.output, "the result")
  local inputs = node.inputs
  for i = 1, inputs.n do if inputs[i] then unchanged(node, inputs[i], "an input") end end
end

local function run(stack)
  while #stack > 0 do
    local node = table.remove(stack)
    local dy = node.grad
    node.grad = nil
    if dy then
      local hook = rawget(node.output, "gradient_hook")
      if hook then hook(dy, node.output) end
      check_unchanged(node)
      if node.again then
        local y = node.again()                 -- a checkpoint: its graph is made now, and taken next
        if y.node then
          collect(y.node, stack)
          to_node(y.node, dy)
        end
      else
        distribute(node, dy, core.scope(node.backward, dy))
      end
      release(dy)
    end
    let_go(node)
  end
end

--- Runs the graph backward from a tensor of one value (or with a gradient given): gradients add up in `.grad` of its leaves.
-- @param gradient wane.Tensor|nil of its own shape; default: 1
function Tensor:backward(gradient)
  local node = rawget(self, "node")
  if not node then
    core.raise "backward: nothing that requires a gradient led to this tensor while recording, or its graph has run backward already"
  end
  if not gradient and self:numel() ~= 1 then core.raise("backward: %s has more than one value: say its gradient", self:describe()) end
  self.kept = true
  M.no_grad(function()
    local seed = gradient or self:ones_like()
    local stack = {}
    collect(node, stack)
    if gradient then hold(gradient) end        -- the caller's: never freed here
    to_node(node, seed)
    local ok, message = pcall(run, stack)
    if gradient then uses[gradient] = nil end
    if not ok then
      uses = {}
      error(message, 0)
    end
  end)
end

-- ---------------------------------------------------------------- checkpoints

--- Runs fn(...) keeping its result alone; backward runs it again to have its graph (Chen et al. 2016). fn must do the same both times;
-- dropout does. Gradients equal those without a checkpoint, bit for bit.
-- @param fn function -> wane.Tensor
-- @return wane.Tensor
function M.checkpoint(fn, ...)
  if not M.recording then return fn(...) end
  local arguments, count, random = { ... }, select("#", ...), M.random_state()
  local inputs = { n = 0 }
  for i = 1, count do
    if Tensor.is(arguments[i]) then
      inputs.n = inputs.n + 1
      inputs[inputs.n] = arguments[i]
    end
  end
  local y = with(false, true, false, core.scope, fn, ...)
  serial = serial + 1
  y.node = { serial = serial, name = "checkpoint", output = y, inputs = inputs, ticket = C.wane_stream_tail(core.stream()), again = function()
    local now = M.random_state()
    M.set_random_state(random)
    local result = with(true, true, false, fn, unpack(arguments, 1, count))
    M.set_random_state(now)
    return result
  end }
  return y
end

-- ---------------------------------------------------------------- random numbers of training

local seed, counter = 0ULL, 0

--- Sets the numbers that dropout draws from here on. Same seed and step, same numbers, whatever was drawn before: a resumed run seeds
-- each step as the unbroken one did.
-- @param value integer
-- @param step integer|nil 0 … 2^31
function M.seed(value, step)
  seed = (value + 0ULL) * 0x9E3779B97F4A7C15ULL + (step or 0) * 0x100000000ULL
  counter = 0
end

--- A seed for one draw, and the next one for the next.
-- @return cdata uint64_t
function M.next_seed()
  counter = counter + 1
  return seed + counter
end

--- Where in its numbers dropout stands, for set_random_state.
-- @return table
function M.random_state() return { seed = seed, counter = counter } end

--- Puts dropout back to where random_state was taken.
-- @param state table
function M.set_random_state(state) seed, counter = state.seed, state.counter end

return M
