#!/usr/bin/env luajit
--- Times products with one weight and their gradients: GFLOP/s, the median and the best of rounds, of y = x W^T and of dx = dy W.
--
--     luajit bench/products.lua [kind=nf4] [x=bf16] [rounds=15] M:N:K …     (M rows of x, a weight of [N, K]; kind: nf4, nf4dq, bf16, int8 by its
--     values alone, or llm_int8 with int8 activations)
--
-- Every round repeats a product for about 4 GFLOP on the same tensors, so that small weights are in the caches, as a training step has them.
-- WANE_LIB names another build of libwane, to take turns with.

local here = arg[0]:match "^(.*/)[^/]*$" or "./"
package.path = here .. "../lua/?.lua;" .. here .. "../lua/?/init.lua;" .. package.path
local wane = require "wane"
local core = require "wane.core"
local F = require "wane.nn.functional"
local C = core.C

local o, shapes = { kind = "nf4", x = "bf16", rounds = "15" }, {}
for _, word in ipairs(arg) do
  local key, value = word:match "^(%w+)=([%w_]+)$"
  local M, N, K = word:match "^(%d+):(%d+):(%d+)$"
  if key and o[key] then o[key] = value
  elseif M then shapes[#shapes + 1] = { tonumber(M), tonumber(N), tonumber(K) }
  else error(("bench/products.lua: '%s' is neither an option (kind=, x=, rounds=) nor a shape M:N:K"):format(word), 0) end
end

local function weight(N, K)
  local w = wane.randn { N, K, std = 0.02 }
  if o.kind == "bf16" then return w:to "bf16" end
  if o.kind:match "int8$" then return wane.quant.quantize(w, { type = "int8" }) end
  return wane.quant.quantize(w, { type = "nf4", double_quant = o.kind == "nf4dq" })
end

--- Seconds of one call of fn: the median round's and the best's.
local function time(fn, calls)
  local seconds = {}
  for round = 0, tonumber(o.rounds) do
    local begun = C.wane_clock()
    for _ = 1, calls do core.scope(fn) end
    core.wait()
    if round > 0 then seconds[round] = (C.wane_clock() - begun) / calls end
  end
  table.sort(seconds)
  return seconds[math.ceil(#seconds / 2)], seconds[1]
end

for _, shape in ipairs(shapes) do
  local M, N, K = shape[1], shape[2], shape[3]
  local w, x, dy = weight(N, K), wane.randn { M, K }:to(o.x), wane.randn { M, N }:to(o.x)
  local gigaflop = 2 * M * N * K / 1e9
  local calls = math.max(2, math.ceil(4 / gigaflop))
  local y, y_best = time(function() F.linear(x, w, nil, C.WANE_COMPUTE_BF16, o.kind == "llm_int8" and 6 or -1) end, calls)
  local dx, dx_best = time(function()
    local h = core.handle_type()
    core.check(C.wane_linear_backward(core.stream(), h, dy.h, w.h, C.WANE_COMPUTE_BF16))
    wane.Tensor.wrap(h)
  end, calls)
  print(("%5d rows, %5d x %-5d %-8s forward %5.0f (best %5.0f)  backward %5.0f (best %5.0f) GFLOP/s"):format(M, N, K, o.kind, gigaflop / y, gigaflop / y_best,
        gigaflop / dx, gigaflop / dx_best))
  w:close() x:close() dy:close()
end
