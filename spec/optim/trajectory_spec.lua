-- A QLoRA run of twenty updates against torch's (spec/fixtures/train/trajectory): losses, gradient norms, adapters and moments, step by step.
local cjson = require "cjson"
local core = require "wane.core"
local F = require "wane.nn.functional"
local lora = require "wane.lora"
local safetensors = require "spec.support.safetensors"
local schedule = require "wane.optim.schedule"
local wane = require "wane"

local root = "spec/fixtures/train/trajectory/"

local function json(path)
  local f = assert(io.open(path))
  local text = f:read "*a"
  f:close()
  return cjson.decode(text)
end

-- The adapter to start from, as a folder of PEFT's.
local function start_folder(run)
  local dir = os.tmpname()
  os.remove(dir)
  assert(os.execute(("mkdir -p %s && cp %sinitial.safetensors %s/adapter_model.safetensors"):format(dir, root, dir)) == 0)
  local f = assert(io.open(dir .. "/adapter_config.json", "w"))
  f:write(cjson.encode { peft_type = "LORA", task_type = "CAUSAL_LM", r = run.lora.r, lora_alpha = run.lora.alpha, lora_dropout = 0, bias = "none",
    target_modules = run.lora.target_modules })
  f:close()
  return dir
end

-- Row `i` (from 0) of a fixture [N, L] as a list.
local function row(tensor, i)
  local n, out = tensor.shape[2], {}
  for t = 1, n do out[t] = tonumber(tensor.data[i * n + t - 1]) end
  return out
end

-- "gpt_neox.layers.0.mlp.dense_h_to_4h.lora_A.default" as the fixtures spell it.
local function spelled(name) return "base_model.model." .. name:gsub("lora_([AB])%.default$", "lora_%1.weight") end

local function compare(tensor, want)
  local codes = tensor:dtype() == "u8"
  local got, n = F.read(tensor, codes and "uint8_t" or "float")
  assert.equal(want.numel, n)
  local worst, off, squares = 0, 0, 0
  for i = 0, n - 1 do
    local d = math.abs(got[i] - want.data[i])
    if not (d <= worst) then worst = d end
    if d > 0 then off = off + 1 end
    squares = squares + d * d
  end
  return worst, off / n, math.sqrt(squares / n)
end

local function count_labels(rows)
  local n = 0
  for _, labels in ipairs(rows) do for t = 2, #labels do if labels[t] ~= -100 then n = n + 1 end end end
  return n
end

-- Runs it; visit(step, params, opt) after each update. checkpointing: layers are run again.
local function follow(make, checkpointing, log, visit)
  local run, data = json(root .. "run.json"), safetensors.read(root .. "data.safetensors")
  local model = assert(wane.load(root .. "base-nf4-dq", { tokenizer = false, compute = "f32" }))
  local dir = start_folder(run)
  assert(lora.load(model, dir, { trainable = true }))
  os.execute("rm -r " .. dir)
  model:checkpoint_layers(checkpointing)
  local params = model:trainable_parameters()
  local opt = make(params, { lr = run.lr, betas = run.betas, eps = run.eps, weight_decay = run.weight_decay })
  local rate = schedule.new(run.schedule, { lr = run.lr, warmup_steps = run.warmup_steps, total_steps = run.steps })
  local at, worst = 0, { loss = 0, norm = 0 }
  for step = 1, run.steps do
    core.scope(function()
      local want, micro, total, all = log.steps[step], {}, 0, {}
      for k = 1, run.accumulate do
        micro[k] = { ids = {}, labels = {} }
        for b = 1, run.batch do
          micro[k].ids[b], micro[k].labels[b] = row(data.input_ids, at), row(data.labels, at)
          all[#all + 1] = micro[k].labels[b]
          at = at + 1
        end
      end
      local count = count_labels(all)
      assert.equal(want.num_items, count)
      for _, m in ipairs(micro) do
        local loss = model:loss(m.ids, m.labels, { count = count })
        loss:backward()
        total = total + loss:item()
      end
      local norm = opt:clip(run.max_grad_norm):item()
      opt.groups[1].lr = rate(step - 1)
      assert.is_true(math.abs(opt.groups[1].lr - want.lr) < 1e-12)
      opt:step()
      opt:zero_grad()
      worst.loss, worst.norm = math.max(worst.loss, math.abs(total - want.loss)), math.max(worst.norm, math.abs(norm - want.grad_norm))
    end)
    visit(step, params, opt)
  end
  model:close()
  return worst
end

describe("twenty updates of QLoRA", function()
  for _, checkpointing in ipairs { false, true } do
    it("with AdamW equal torch's" .. (checkpointing and ", checkpointed" or ""), function()
      local want = safetensors.read(root .. "adamw.safetensors")
      local tensors = 0
      local worst = follow(wane.optim.AdamW, checkpointing, json(root .. "adamw.json"), function(step, params, opt)
        local states = opt:state().params
        for _, p in ipairs(params) do
          local key = ("step%d/%s"):format(step, spelled(p.name))
          if want[key] then
            tensors = math.max(tensors, (compare(p, want[key])), (compare(states[p.name].m, want[key .. "/m"])), (compare(states[p.name].v, want[key .. "/v"])))
          end
        end
      end)
      print(("  largest differences: loss %.2g, gradient norm %.2g, tensors %.2g"):format(worst.loss, worst.norm, tensors))
      assert.is_true(worst.loss <= 1e-5 and worst.norm <= 1e-5 and tensors <= 1e-5 and tensors > 0)
    end)
  end

  it("with 8-bit AdamW equal the reference", function()
    local want = safetensors.read(root .. "adamw8bit_reference.safetensors")
    local tensors, rms, early, late = 0, 0, 0, 0
    local function make(params, o)
      o.upstream = true
      return wane.optim.PagedAdamW8bit(params, o)
    end
    local worst = follow(make, false, json(root .. "adamw8bit_reference.json"), function(step, params, opt)
      local states = opt:state().params
      for _, p in ipairs(params) do
        local key = ("step%d/%s"):format(step, spelled(p.name))
        if want[key] then
          local d, _, r = compare(p, want[key])
          tensors, rms = math.max(tensors, d), math.max(rms, r)
          for _, moment in ipairs { "m", "v" } do
            if states[p.name][moment]:dtype() == "u8" then
              local most, share = compare(states[p.name][moment], want[key .. "/" .. moment])
              if step <= 2 then
                assert.is_true(most <= 1)
                early = math.max(early, share)
              else
                late = math.max(late, share)
              end
            end
          end
        end
      end
    end)
    print(("  8-bit: loss %.2g, tensors %.2g (rms %.2g), codes off %.3f %% early, %.2f %% late"):format(worst.loss, tensors, rms, 100 * early, 100 * late))
    assert.is_true(worst.loss <= 1e-4 and tensors <= 2e-3 and rms <= 5e-5 and early <= 5e-4 and late <= 0.03)
  end)
end)
