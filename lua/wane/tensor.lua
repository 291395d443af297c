--- Tensors: a table around a C handle, `{ h = wane_handle }`, with Torch's names.
--
--     local x = wane.tensor({ { 1, 2 }, { 3, 4 } })        -- f32 [2, 2]
--     x[1] = x[2] + 2 * x:t()[1]                           -- rows; numbers and smaller tensors are broadcast
--     print(x[{ {}, { 1, 1 } }]:sum(), x[2][1])            -- a slice's sum (a tensor), one value (a number)
--
-- COUNTING. Positions in calls (dimensions, rows, starts, `x[i]`) count from 1, and negative ones from the end, as in Torch.
-- Tensors that HOLD indices (argmax, sort, topk give them; gather, index_select take them) count from 0: token ids do.
--
-- WAITING. Every operation is enqueued and returns at once; Lua waits where it reads a value: item, totable, tostring, equal,
-- `x[i]` when that is one value.
--
-- MEMORY. A tensor made in wane.scope is freed at the scope's end unless the scope's function returns it; outside of scopes
-- close() frees it, or at the latest the garbage collector, which cannot see its size.
--
-- GRADIENTS. While wane.autograd records and an operand leads to a leaf, a method notes how its result came about, or it is an error:
-- see wane/autograd/methods.lua.
--
-- In reading order: wane/tensor/object.lua, create.lua (making), values.lua (converting, overwriting, reading), views.lua (views
-- and indexing), elementwise.lua, reduce.lua, math.lua (products, joining, sorting, picking), print.lua.
-- @module wane.tensor
local Tensor = require "wane.tensor.object"
local create = require "wane.tensor.create"
require "wane.tensor.values"
require "wane.tensor.views"
require "wane.tensor.elementwise"
require "wane.tensor.reduce"
require "wane.tensor.math"
require "wane.tensor.print"
require("wane.quant.parts").register(Tensor)

-- wane.save, wane.load_tensors: they need the checkpoint reader and writer, which need tensors.
function create.save(...) return require("wane.serialize").save(...) end
function create.load_tensors(...) return require("wane.serialize").load(...) end

require "wane.autograd.methods"          -- last: it stands in the place of the methods

return Tensor
