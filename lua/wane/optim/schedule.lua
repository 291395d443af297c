--- Learning rates over the updates of a run. Update t counts from 0; all kinds rise linearly over the warm-up,
-- from 0 (warmup_stable_decay: from its least rate).
--
--     local rate = schedule.new("cosine", { lr = 2e-4, warmup_steps = 10, total_steps = 200 })
--     for t = 0, 199 do … opt.groups[1].lr = rate(t) … end
--
-- Source: transformers optimization.py.
-- @module wane.optim.schedule
local core = require "wane.core"

local M = {}

-- Each kind: (t, o) -> factor of lr behind the warm-up; o has warmup_steps (w), total_steps (n).
local kinds = {}

local function progress(t, o) return (t - o.warmup_steps) / math.max(1, o.total_steps - o.warmup_steps) end

function kinds.constant() return 1 end
function kinds.constant_with_warmup() return 1 end
function kinds.linear(t, o) return math.max(0, (o.total_steps - t) / math.max(1, o.total_steps - o.warmup_steps)) end
function kinds.cosine(t, o) return math.max(0, 0.5 * (1 + math.cos(math.pi * (o.num_cycles or 0.5) * 2 * progress(t, o)))) end
function kinds.cosine_with_restarts(t, o)
  local p = progress(t, o)
  if p >= 1 then return 0 end
  return math.max(0, 0.5 * (1 + math.cos(math.pi * (((o.num_cycles or 1) * p) % 1))))
end
function kinds.cosine_with_min_lr(t, o)
  local least = o.min_lr_rate or o.min_lr / o.lr
  return math.max(0, 0.5 * (1 + math.cos(math.pi * (o.num_cycles or 0.5) * 2 * progress(t, o))) * (1 - least) + least)
end
function kinds.polynomial(t, o)
  local last = o.lr_end or 1e-7
  if t > o.total_steps then return last / o.lr end
  local left = 1 - (t - o.warmup_steps) / (o.total_steps - o.warmup_steps)
  return ((o.lr - last) * left ^ (o.power or 1) + last) / o.lr
end
function kinds.inverse_sqrt(t, o)
  local scale = o.timescale or (o.warmup_steps > 0 and o.warmup_steps or 10000)
  return 1 / math.sqrt((t + scale - o.warmup_steps) / scale)
end
-- Warm up, stay, go down by a cosine.
function kinds.warmup_stable_decay(t, o)
  local decay = o.num_decay_steps
  local stable, least = o.num_stable_steps or o.total_steps - o.warmup_steps - decay, o.min_lr_ratio or 0
  if t < o.warmup_steps + stable then return 1 end
  if t < o.warmup_steps + stable + decay then
    local p = (t - o.warmup_steps - stable) / math.max(1, decay)
    return math.max(0, 0.5 * (1 + math.cos(math.pi * (o.num_cycles or 0.5) * 2 * p))) * (1 - least) + least
  end
  return least
end

-- What each kind takes besides lr, total_steps and warmup_steps.
local takes = {
  constant = {}, constant_with_warmup = {}, linear = {}, cosine = { "num_cycles" }, cosine_with_restarts = { "num_cycles" },
  cosine_with_min_lr = { "num_cycles", "min_lr", "min_lr_rate" }, polynomial = { "power", "lr_end" }, inverse_sqrt = { "timescale" },
  warmup_stable_decay = { "num_cycles", "num_decay_steps", "num_stable_steps", "min_lr_ratio" },
}

-- What a kind cannot do without, as upstream: any of some options, and what they are.
local needs = {
  cosine_with_min_lr = { "min_lr", "min_lr_rate", text = "min_lr, the rate at the end (--min-lr on the command line), or min_lr_rate, its share of lr" },
  warmup_stable_decay = { "num_decay_steps", text = "num_decay_steps, the updates in which the rate falls (--num-decay-steps on the command line)" },
}

-- Raises where `o` has what its kind does not take, or lacks what it needs: at once, not at the update that would ask for it.
local function check_options(name, o)
  local known = { lr = true, total_steps = true, warmup_steps = true }
  for _, key in ipairs(takes[name]) do known[key] = true end
  for key, value in pairs(o) do
    if not known[key] then
      core.raise("schedule: %s has no option '%s'; it has %s", name, tostring(key), #takes[name] > 0 and table.concat(takes[name], ", ") or "none")
    end
    if type(value) ~= "number" or value ~= value then core.raise("schedule: %s: expected a number, found %s", key, tostring(value)) end
  end
  local given = 0
  for _, key in ipairs(needs[name] or {}) do given = given + (o[key] ~= nil and 1 or 0) end
  if needs[name] and given == 0 then core.raise("schedule: %s needs %s", name, needs[name].text) end
  if given > 1 then core.raise("schedule: %s takes one of %s", name, table.concat(needs[name], " and ")) end
end

--- The learning rate as a function of the update.
-- @param name string linear, cosine, constant, constant_with_warmup, inverse_sqrt, cosine_with_restarts, polynomial, cosine_with_min_lr,
--   warmup_stable_decay
-- @param o table { lr, total_steps, warmup_steps = 0 (below 1: a share of total_steps), and the kind's own: num_cycles (the cosines,
--   warmup_stable_decay), min_lr or min_lr_rate (cosine_with_min_lr), power, lr_end (polynomial), timescale (inverse_sqrt), num_decay_steps,
--   num_stable_steps, min_lr_ratio (warmup_stable_decay) }; another is refused
-- @return function(t) -> number, t from 0
function M.new(name, o)
  local kind = kinds[name]
  if not kind then
    local known = {}
    for key in pairs(kinds) do known[#known + 1] = key end
    table.sort(known)
    core.raise("schedule: there is no '%s'; there are %s", tostring(name), table.concat(known, ", "))
  end
  if type(o.lr) ~= "number" or not (o.lr >= 0 and o.lr < math.huge) then
    core.raise("schedule: expected a learning rate, a number from 0 on, found %s", tostring(o.lr))
  end
  check_options(name, o)
  if (o.warmup_steps or 0) < 0 then core.raise("schedule: warmup_steps: expected a number from 0 on, found %s", tostring(o.warmup_steps)) end
  local p = {}
  for key, value in pairs(o) do p[key] = value end
  p.warmup_steps = p.warmup_steps or 0
  if p.warmup_steps > 0 and p.warmup_steps < 1 then p.warmup_steps = math.ceil(p.total_steps * p.warmup_steps) end
  if name ~= "constant" and name ~= "constant_with_warmup" and name ~= "inverse_sqrt" and type(p.total_steps) ~= "number" then
    core.raise("schedule: '%s' needs total_steps", name)
  end
  return function(t)
    if name == "constant" or t >= p.warmup_steps then return p.lr * kind(t, p) end
    local from = name == "warmup_stable_decay" and p.min_lr_ratio or 0
    return p.lr * (t / math.max(1, p.warmup_steps) * (1 - from) + from)
  end
end

return M
