--- Low-rank adapters (LoRA, Hu et al. 2021; DoRA, Liu et al. 2024) in PEFT's files: small matrices beside frozen weights, of any scheme.
--
--     local lora = require "wane.lora"
--     assert(lora.load(model, "my-adapter"))                        -- or wane.load(path, { lora = "my-adapter" })
--     assert(lora.load(model, "other", { name = "other" }))
--     lora.attach(model, { r = 8, target_modules = "all-linear" })   -- a fresh one, to be trained: model:loss(ids, labels):backward()
--     lora.set_adapter(model, { "default", "other" })               -- both at once; their changes add up
--     lora.scale(model, 0.5, "other")
--     lora.disable(model) … lora.enable(model)
--     local report = assert(lora.merge(model, "default"))           -- into the weights; unmerge gives their very bytes back
--
-- A Linear with adapters is still a Linear: model files know nothing of this. Formulas: wane.nn.adapter; matching: wane.lora.targets;
-- files: wane.lora.files; merging: wane.lora.merge. docs/adapters.md has the whole story.
-- @module wane.lora
local core = require "wane.core"
local F = require "wane.nn.functional"
local Tensor = require "wane.tensor"
local config_file = require "wane.lora.config"
local count = require "wane.lora.count"
local files = require "wane.lora.files"
local hub = require "wane.hub"
local merging = require "wane.lora.merge"
local states = require "wane.lora.state"
local targets = require "wane.lora.targets"

local M = {}

-- ---------------------------------------------------------------- making and loading

local function new_name(state, name)
  name = name or "default"
  if type(name) ~= "string" or not name:find "^[%w_-]+$" then
    core.raise("lora: a name is letters, digits, '_' and '-', found %s", type(name) == "string" and "'" .. name .. "'" or tostring(name))
  end
  if state.adapters[name] then core.raise("lora: there is an adapter '%s' already: lora.delete it, or give another name", name) end
  return name
end

-- Modules of which all, some or no parameters of their own are trained: fn(path, trained = how many, all, names of the trained).
local function each_trained(model, state, fn)
  for path, module in model:modules() do
    local trained, all, names = 0, 0, {}
    for _, p in ipairs(module:own_parameters()) do
      local own = state:own(module, path, p.name)
      if own then
        all = all + 1
        if rawget(own, "requires_grad") then trained, names[p.name] = trained + 1, own end
      end
    end
    if all > 0 then fn(path, trained, all, names) end
  end
end

-- An adapter that is already made holds what it holds: parameters of the model's own that are trained beside it would be in no file.
local function refuse_own_leaves(model, state, what)
  each_trained(model, state, function(path, _, _, names)
    local name = next(names)
    if name then
      core.raise("%s: '%s.%s' of the model itself is trained, which this adapter's files cannot hold: lora.attach takes it into a fresh adapter, "
        .. "model:freeze() lets it rest", what, path, name)
    end
  end)
end

local function check_options(what, given, known)
  for key in pairs(given or {}) do if not known[key] then core.raise("%s: there is no option '%s'", what, tostring(key)) end end
end

--- Attaches an adapter's folder (PEFT's files), or one of that name in the Hugging Face cache. The first adapter of a model becomes
-- active; set_adapter chooses among several.
-- @param model wane.Model
-- @param dir string
-- @param opts table|nil { name = "default", trainable = true: go on training it (PEFT's is_trainable); an error where parameters of the model itself
--   are trained, which lora.save would not write }
-- @return table|nil report { name, modules, parameters, missing = targets without values, unexpected = values that the config does not ask for,
--   unused = entries of target_modules that name nothing }, string|nil message, string|nil code
function M.load(model, dir, opts)
  local state = states.of(model)
  check_options("lora.load", opts, { name = true, trainable = true })
  if type(dir) ~= "string" then core.raise("lora.load: expected a folder, found a %s", type(dir)) end
  local name = new_name(state, opts and opts.name)
  if opts and opts.trainable then refuse_own_leaves(model, state, "lora.load") end
  local folder, message, code = hub.resolve(dir)
  if not folder then return nil, message, code end
  local adapter
  adapter, message, code = files.read(model, (folder:gsub("(.)/+$", "%1")))
  if not adapter then return nil, message, code end
  state:add(name, adapter)
  if opts and opts.trainable then state:train(model, name, true) else state:refresh(model) end
  local report = { name = name, modules = 0, parameters = M.parameters(model, name) }
  for key, value in pairs(adapter.report) do report[key] = value end
  for _ in pairs(adapter.parts) do report.modules = report.modules + 1 end
  return report
end

local option_names = { r = "r", alpha = "lora_alpha", dropout = "lora_dropout", target_modules = "target_modules", exclude_modules = "exclude_modules",
  bias = "bias", use_rslora = "use_rslora", use_dora = "use_dora", lora_bias = "lora_bias", modules_to_save = "modules_to_save",
  rank_pattern = "rank_pattern", alpha_pattern = "alpha_pattern", layers_to_transform = "layers_to_transform", layers_pattern = "layers_pattern",
  init_lora_weights = "init_lora_weights", name = false, seed = false }

local initialisations = { [true] = true, [false] = true, gaussian = true }

-- A completed config from attach's options.
local function config_of(model, o)
  check_options("lora.attach", o, setmetatable({}, { __index = function(_, key) return option_names[key] ~= nil end }))
  local given = { base_model_name_or_path = model.path, task_type = model.encode and "SEQ_2_SEQ_LM" or "CAUSAL_LM" }
  for key, value in pairs(o) do if option_names[key] then given[option_names[key]] = value end end
  if given.init_lora_weights == nil then given.init_lora_weights = true end
  if not initialisations[given.init_lora_weights] then
    core.raise("lora.attach: init_lora_weights: expected true, false or 'gaussian', found '%s'", tostring(given.init_lora_weights))
  end
  given.target_modules = given.target_modules or targets.defaults[model.family.name]
  if not given.target_modules then core.raise("lora.attach: say target_modules: there is no default for %s models", model.family.name) end
  local config, message = config_file.complete(given)
  if not config then core.raise("lora.attach: %s", message) end
  return config
end

-- Two generators of f32 matrices [rows, columns], normal with a deviation and uniform in a bound, each matrix from its own stretch of the
-- seed's numbers.
local function generators(seed)
  local offset, new = 0, Tensor.constructors
  local function draw(make, options, rows, columns)
    options[1], options[2], options.seed, options.offset = rows, columns, seed, offset
    offset = offset + rows * columns
    return make(options)
  end
  return {
    normal = function(std, rows, columns) return draw(new.randn, { std = std }, rows, columns) end,
    uniform = function(bound, rows, columns) return draw(new.rand, { low = -bound, high = bound }, rows, columns) end,
  }
end

local zeros = Tensor.constructors.zeros

-- Fresh A and B. Linear: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5) or normal with deviation 1/r, B zero; "false" (for tests):
-- both random. Embedding: A zero, B normal. Source: peft tuners/lora/layer.py reset_lora_parameters.
local function fresh_part(target, config, random)
  local module, r, init = target.module, target.r, config.init_lora_weights
  local part = { r = r, scale = target.scale, dropout = config.lora_dropout, path = target.path, spelled = target.spelled }
  if target.kind == "embedding" then
    part.A = init and zeros(r, module.count) or random.normal(1, r, module.count)
    part.B = random.normal(1, module.width, r)
  else
    local inputs, outputs = module.in_features, module.out_features
    part.A = init == "gaussian" and random.normal(1 / r, r, inputs) or random.uniform(1 / math.sqrt(inputs), r, inputs)
    part.B = init and zeros(outputs, r) or random.uniform(1 / math.sqrt(r), outputs, r)
    if config.lora_bias then part.bias = zeros(outputs) end
  end
  return part
end

-- DoRA's first magnitude: the norm of W + s·B A by output.
local function first_magnitude(module, part)
  local W = module.weight:dequantize "f32" + require("wane.nn.adapter").delta(module, part)
  return W:norm(2, module.in_features and 2 or 1)
end

-- Copies of what an adapter trains besides: whole modules, biases.
local function fresh_replaced(model, config, parts)
  local replaced, used = {}, {}
  for path, module in model:modules() do
    local spelled, entry = path, nil
    for _, s in ipairs(targets.spellings(model, path)) do
      if not entry then spelled, entry = s, targets.is_saved(s, config.modules_to_save) end
    end
    if not entry then spelled = path end
    for _, p in ipairs(module:own_parameters()) do
      local wanted = entry or (p.name == "bias" and (config.bias == "all" or (config.bias == "lora_only" and parts[path])))
      if wanted and p.value then
        if not p.value:is_float() then
          core.raise("lora.attach: '%s' is %s, which cannot be trained: leave it out of modules_to_save, or load the model with it on the skip list",
            path, p.value:dtype())
        end
        replaced[path] = replaced[path] or { spelled = spelled }
        replaced[path][p.name] = p.value:clone()
        if entry then used[entry] = true end
      end
    end
  end
  for _, entry in ipairs(config.modules_to_save or {}) do
    if not used[entry] then core.raise("lora.attach: modules_to_save: nothing in this model is called '%s'; print(model) draws the tree", entry) end
  end
  return replaced
end

local function ends(text, with) return text:sub(-#with) == with end

-- Entries of modules_to_save that mean the paths of a set and no other module, sorted. PEFT compares the ends of paths as text, those of the modules
-- around one too ("norm" is "input_layernorm", T5's "k" is all of "encoder.block"): the last name of a path stands for it only where all that it means
-- is of the set; else the whole path does. Raises where that means others as well.
local function names_of(model, set)
  local others, chosen, list = {}, {}, {}
  for path in model:modules() do
    for _, spelled in ipairs(set[path] and {} or targets.spellings(model, path)) do others[#others + 1] = { spelled = spelled, path = path } end
  end
  local function means_another(entry)
    for _, other in ipairs(others) do if targets.is_saved(other.spelled, { entry }) then return other.path end end
  end
  for path in pairs(set) do
    local name = path:match "[^.]*$"
    if not chosen[name] and means_another(name) then
      name = path
      local other = means_another(path)
      if other then
        core.raise("lora.attach: '%s' is trained and '%s' is not, but modules_to_save cannot name one without the other, as PEFT compares the ends of paths: "
          .. "train both", path, other)
      end
    end
    chosen[name] = true
  end
  for name in pairs(chosen) do
    local covered = false
    for other in pairs(chosen) do covered = covered or (other ~= name and ends(name, other)) end
    if not covered then list[#list + 1] = name end
  end
  table.sort(list)
  return list
end

-- What model:train_parameters chose, as PEFT's files can hold it: modules trained whole become modules_to_save, biases of others bias = "all". The model's own
-- stay as they are from here on. Returns attach's options with these, and the tensors chosen (a set).
local function adopt(model, state, o)
  local whole, biases, untrained, seen = {}, false, nil, {}
  each_trained(model, state, function(path, trained, all, names)
    for name, tensor in pairs(names) do
      if seen[tensor] then
        core.raise("lora.attach: '%s.%s' is trained and shared with '%s', which an adapter cannot hold: leave it out, or name one in modules_to_save",
          path, name, seen[tensor])
      end
      seen[tensor] = path
    end
    if trained == all then whole[path] = true
    elseif trained == 1 and names.bias then biases = true
    elseif trained > 0 then
      core.raise("lora.attach: of '%s' the %s is trained but not all, which an adapter's files cannot hold: train the module whole, or its bias alone",
        path, (next(names)))
    elseif rawget(model:find(path), "bias") then untrained = path end
  end)
  if not next(seen) then return o, seen end
  if biases and untrained then
    core.raise("lora.attach: some biases are trained and that of '%s' is not; an adapter's files hold all biases or none: choose '1-d', or leave biases out",
      untrained)
  end
  local given = {}
  for key, value in pairs(o) do given[key] = value end
  given.modules_to_save = { unpack(o.modules_to_save or {}) }
  for _, name in ipairs(names_of(model, whole)) do table.insert(given.modules_to_save, name) end
  if biases then given.bias = "all" end
  return given, seen
end

--- Attaches a fresh adapter, which changes nothing until it is trained; its tensors are leaves of wane.autograd. Options are PEFT's
-- LoraConfig. Parameters that model:train_parameters chose before are taken into it, as modules_to_save and biases: lora.save writes them too.
-- @param model wane.Model
-- @param o table|nil { name = "default", r = 8, alpha = 8, dropout = 0, target_modules = list | regular expression | "all-linear" (default:
--   PEFT's for the family), exclude_modules, bias = "none" | "all" | "lora_only", use_rslora, use_dora, lora_bias, modules_to_save, rank_pattern,
--   alpha_pattern, layers_to_transform, layers_pattern, init_lora_weights = true | false | "gaussian", seed = 0 }
-- @return table report { name, modules, parameters, unused = entries of target_modules that name nothing }
function M.attach(model, o)
  o = o or {}
  local state = states.of(model)
  local name, given, chosen = new_name(state, o.name), adopt(model, state, o)
  local config = config_of(model, given)
  local found, unused = targets.match(model, config)
  if not found then core.raise("lora.attach: %s", unused) end
  local ok, message = files.rank(config, found)
  if not ok then core.raise("lora.attach: %s", message) end
  local adapter = { config = config, parts = {}, report = {} }
  F.outside_scopes(function()
    local random = generators(o.seed or 0)
    for _, target in ipairs(found) do
      local part = fresh_part(target, config, random)
      if config.use_dora then part.magnitude = core.scope(first_magnitude, target.module, part) end
      adapter.parts[target.path] = part
    end
    adapter.replaced = fresh_replaced(model, config, adapter.parts)
  end)
  state:add(name, adapter)
  state:train(model, name, true)
  for tensor in pairs(chosen) do tensor.requires_grad, tensor.grad = nil, nil end               -- the adapter's copies are trained in their place
  return { name = name, modules = #found, parameters = M.parameters(model, name), unused = unused }
end

--- Whether an adapter's tensors are trained; those that attach made are. As with lora.load's `trainable`, not beside parameters of the model itself.
-- @param model wane.Model
-- @param on boolean
-- @param name string|nil default: all active ones
function M.train(model, on, name)
  local state = states.of(model)
  if on then refuse_own_leaves(model, state, "lora.train") end
  for _, each in ipairs(state:names(name, state.active)) do state:train(model, each, on) end
end

--- Prepares a quantized model for adapters as peft's prepare_model_for_kbit_training does: nothing of the model itself is trained, norms and
-- biases are f32, and layers are checkpointed unless told otherwise. Frozen 16-bit embeddings and heads stay as they are and widen in use
-- (upstream makes them f32, which costs 4 bytes a value). Gradients reach the input of every adapter without further ado.
-- @param model wane.Model
-- @param opts table|nil { checkpointing = true }
-- @return wane.Model
function M.prepare_for_kbit_training(model, opts)
  check_options("lora.prepare_for_kbit_training", opts, { checkpointing = true })
  model:freeze()
  local narrow = {}
  for _, tensor in model:parameters() do
    if tensor:is_float() and tensor:dim() == 1 and tensor:dtype() ~= "f32" then narrow[tensor] = true end
  end
  for tensor in pairs(narrow) do
    model:replace_parameter(tensor, F.outside_scopes(F.cast, tensor, core.C.WANE_F32))
    tensor:close()
  end
  return model:checkpoint_layers(not opts or opts.checkpointing ~= false)
end

--- Writes an adapter's folder as PEFT does: adapter_model.safetensors and adapter_config.json.
-- @param model wane.Model
-- @param dir string made if it is not there
-- @param name string|nil default: the active adapter
-- @return true|nil, string|nil message, string|nil code
function M.save(model, dir, name)
  local state = states.of(model)
  if type(dir) ~= "string" then core.raise("lora.save: expected a folder, found a %s", type(dir)) end
  if not name and #state.active ~= 1 then core.raise("lora.save: say which adapter: %d are active", #state.active) end
  return files.write(model, state:find(name or state.active[1]), dir)
end

--- The adapters that training changes: those with tensors among model:trainable_parameters(). A frozen one that is active beside them is none, nor is
-- one that waits.
-- @param model wane.Model
-- @return string[] names, in the order in which they came
function M.trained(model)
  local state, leaves, names = states.of(model), {}, {}
  for _, tensor in ipairs(model:trainable_parameters()) do leaves[tensor] = true end
  for _, name in ipairs(state.order) do
    local any = false
    states.each_tensor(state.adapters[name], function(tensor) any = any or leaves[tensor] ~= nil end)
    if any then names[#names + 1] = name end
  end
  return names
end

--- Writes the adapters that training changes: one into the folder itself, several each into a folder of its name in it; none: nothing.
-- @param model wane.Model
-- @param dir string made if it is not there
-- @return true|nil, string|nil message, string|nil code
function M.save_trained(model, dir)
  local names = M.trained(model)
  for _, name in ipairs(names) do
    local ok, message, code = M.save(model, #names == 1 and dir or dir .. "/" .. name, name)
    if not ok then return nil, message, code end
  end
  return true
end

-- ---------------------------------------------------------------- what is in force

--- Makes an adapter active, or several, whose changes add up; {} for none.
-- @param model wane.Model
-- @param names string|string[]
function M.set_adapter(model, names)
  local state = states.of(model)
  if names == nil then core.raise "lora.set_adapter: expected a name or a list of names; {} for none" end
  state:activate(model, state:names(names))
end

--- Multiplies what an adapter adds by a factor (1: as trained). Merged adapters are not changed: unmerge first.
-- @param model wane.Model
-- @param factor number
-- @param names string|string[]|nil default: the active ones
function M.scale(model, factor, names)
  local state = states.of(model)
  if type(factor) ~= "number" or factor ~= factor or math.abs(factor) == math.huge then core.raise "lora.scale: expected a finite number" end
  names = state:names(names, state.active)
  for _, name in ipairs(names) do
    if state:is_merged(name) then core.raise("lora.scale: adapter '%s' is merged: unmerge it first", name) end
  end
  for _, name in ipairs(names) do
    local adapter = state:find(name)
    adapter.factor = factor
    for _, part in pairs(adapter.parts) do part.scale = part.plain_scale * factor end
  end
end

--- The base model again, until enable: adapters rest, merged or not.
-- @param model wane.Model
function M.disable(model)
  local state = states.of(model)
  state.disabled = true
  state:refresh(model)
end

--- Ends disable.
-- @param model wane.Model
function M.enable(model)
  local state = states.of(model)
  state.disabled = false
  state:refresh(model)
end

--- Merges adapters into the weights: faster by two products a layer, and what other programs can read. A quantized weight is dequantized,
-- changed and quantized again; the report says what that cost. The base's own weights are kept for unmerge, unless unloaded.
-- @param model wane.Model
-- @param names string|string[]|nil default: the active ones
-- @param opts table|nil { unload = true: let the base's own weights and the adapters go (PEFT's merge_and_unload) }
-- @return table|nil { layers = { { path, type, rel_error = |made - wanted| / |wanted| (Frobenius), max_error, update = |change| / |wanted|,
--   lost = |made - wanted| / |change|, below_step } … }, warnings = string[] }, string|nil message, string|nil code
function M.merge(model, names, opts)
  local state = states.of(model)
  check_options("lora.merge", opts, { unload = true })
  local unload = opts and opts.unload or false
  if unload and state.disabled then M.enable(model) end
  return merging.merge(model, state, state:names(names, state.active), unload)
end

--- Takes merged adapters out of the weights; the base's own bytes are back when none is left.
-- @param model wane.Model
-- @param names string|string[]|nil default: all that are merged
-- @return true|nil, string|nil message, string|nil code
function M.unmerge(model, names)
  local state = states.of(model)
  return merging.unmerge(model, state, state:names(names, { unpack(state.merged) }))
end

--- Removes an adapter and frees it. A merged one must be unmerged first.
-- @param model wane.Model
-- @param name string
function M.delete(model, name)
  local state = states.of(model)
  state:find(name)
  if state:is_merged(name) then core.raise("lora.delete: adapter '%s' is merged: unmerge it first", name) end
  local left = {}
  for _, other in ipairs(state.active) do if other ~= name then left[#left + 1] = other end end
  state:activate(model, left)
  state:drop(name)
end

-- ---------------------------------------------------------------- asking

--- The adapters of a model, in the order in which they came.
-- @param model wane.Model
-- @return table[] { name, r, alpha, modules, parameters, bytes, active, merged, scale = factor set by lora.scale, dora, config }
function M.list(model)
  local state, list = states.of(model), {}
  local active = {}
  for _, name in ipairs(state.active) do active[name] = not state.disabled end
  for i, name in ipairs(state.order) do
    local adapter = state.adapters[name]
    local bytes, modules = 0, 0
    states.each_tensor(adapter, function(tensor) bytes = bytes + tensor:nbytes() end)
    for _ in pairs(adapter.parts) do modules = modules + 1 end
    local c = adapter.config
    list[i] = { name = name, r = c.r, alpha = c.lora_alpha, dora = c.use_dora, modules = modules, parameters = M.parameters(model, name), bytes = bytes,
                active = active[name] or false, merged = state:is_merged(name), scale = adapter.factor, config = c }
  end
  return list
end

--- Values that an adapter holds: its matrices, magnitudes and biases, and copies of whole modules and of the base's biases.
-- @param model wane.Model
-- @param name string
-- @return integer
function M.parameters(model, name)
  local n = 0
  states.each_tensor(states.of(model):find(name), function(tensor) n = n + tensor:numel() end)
  return n
end

-- Values of an adapter that PEFT trains, and those of them that it counts beside the base's. A bias trained beside its layer is the base's own
-- to PEFT; an embedding that was saved along is not trained.
local function counted(adapter)
  local trained, added = 0, 0
  states.each_tensor(adapter, function(tensor, path, field, is_part)
    local n, replaced = tensor:numel(), adapter.replaced[path]
    local own = is_part or targets.is_saved(path, adapter.config.modules_to_save) or targets.is_saved(replaced.spelled, adapter.config.modules_to_save)
    if own then added = added + n end
    if own or field == "bias" then trained = trained + n end
  end)
  return trained, added
end

--- The line that PEFT's print_trainable_parameters prints: trainable are the active adapters' values, all are those and the base's.
-- @param model wane.Model
-- @return string "trainable params: 8,650,752 || all params: 10,597,552,128 || trainable%: 0.0816", integer trainable, integer all
function M.trainable_report(model)
  local state, all, trainable, seen = states.of(model), 0, 0, {}
  for path, module in model:modules() do
    for _, p in ipairs(module:own_parameters()) do
      local own = state:own(module, path, p.name)
      if own and not seen[own] then
        seen[own] = true
        all = all + count.held(count.numel(p.shape), own:dtype())
      end
    end
  end
  for _, name in ipairs(state.order) do all = all + select(2, counted(state.adapters[name])) end
  for _, name in ipairs(state.active) do trainable = trainable + counted(state.adapters[name]) end
  return count.line(trainable, all), trainable, all
end

M.is_adapter, M.describe = files.is_adapter, files.describe

return M
