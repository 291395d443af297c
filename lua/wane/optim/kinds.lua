--- The kinds of optimizers: what each keeps, its options and their defaults (bitsandbytes' own, which are torch's and the papers'), and how
-- its options fill the record of wane_optimizer_step, where the formulas are.
-- @module wane.optim.kinds
local core = require "wane.core"
local C = core.C

local function adam_like(o, group)
  o.lr, o.beta1, o.beta2, o.eps, o.weight_decay = group.lr, group.betas[1], group.betas[2], group.eps or 0, group.weight_decay
end

local M = {
  --- Adam with decay apart from the gradient (Loshchilov & Hutter 2019).
  adamw = { code = C.WANE_OPTIMIZER_ADAM, moments = { "m", "v" },
    options = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 1e-2 }, fill = adam_like },
  --- Adam (Kingma & Ba 2015). Decay, where asked for, is AdamW's, as in bitsandbytes.
  adam = { code = C.WANE_OPTIMIZER_ADAM, moments = { "m", "v" },
    options = { lr = 1e-3, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0 }, fill = adam_like },
  --- Signs of interpolated moments (Chen et al. 2023): half of Adam's memory.
  lion = { code = C.WANE_OPTIMIZER_LION, moments = { "m" }, options = { lr = 1e-4, betas = { 0.9, 0.99 }, weight_decay = 0 }, fill = adam_like },
  --- Gradient descent with momentum.
  sgd = { code = C.WANE_OPTIMIZER_SGD, moments = { "m" }, options = { lr = 1e-3, momentum = 0.9, weight_decay = 0 }, fill = function(o, group)
    o.lr, o.beta1, o.beta2, o.eps, o.weight_decay = group.lr, group.momentum, 0, 0, group.weight_decay
  end },
  --- Gradients over the root of their running mean square (Hinton 2012).
  rmsprop = { code = C.WANE_OPTIMIZER_RMSPROP, moments = { "v" }, options = { lr = 1e-2, alpha = 0.99, eps = 1e-8, weight_decay = 0 }, fill = function(o, group)
    o.lr, o.beta1, o.beta2, o.eps, o.weight_decay = group.lr, group.alpha, 0, group.eps, group.weight_decay
  end },
  --- Gradients over the root of the sum of their squares (Duchi et al. 2011).
  adagrad = { code = C.WANE_OPTIMIZER_ADAGRAD, moments = { "v" }, options = { lr = 1e-2, eps = 1e-10, weight_decay = 0 }, fill = function(o, group)
    o.lr, o.beta1, o.beta2, o.eps, o.weight_decay = group.lr, 0, 0, group.eps, group.weight_decay
  end },
}
for name, kind in pairs(M) do kind.name = name end

return M
