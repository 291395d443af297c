--- wane finetune: trains an adapter (or parameters) of a model on rows of text.
local cli = require "wane.cli"

local parser = cli.parser("finetune", "Trains a low-rank adapter beside a frozen, usually quantized model; or parameters of the model itself (--trainable).")
cli.model_options(parser)
parser:option("--data", "JSONL (\"text\" or --text-field, \"messages\", \"input\" and \"target\", \"input_ids\") or a text file.")
parser:option("--text-field", "Field of a JSONL row that holds the text (text).")
parser:option("--bad-rows", "What to do with a row that cannot be used (fail)."):choices { "fail", "skip" }
parser:option("--lora-r", "Rank (8)."):convert(cli.count)
parser:option("--lora-alpha", "Scale: the change is multiplied by alpha / r (16)."):convert(cli.number)
parser:option("--lora-dropout", "Share of the adapter's inputs dropped in training (0)."):convert(cli.number)
parser:option("--target-modules", "Comma-separated names, or all-linear (default: PEFT's for the family).")
parser:option("--modules-to-save", "Comma-separated names of modules that are trained whole beside the adapter.")
parser:option("--bias", "Biases to train (none)."):choices { "none", "all", "lora_only" }
parser:flag("--use-rslora", "Scale by alpha / sqrt(r).")
parser:flag("--use-dora", "Train magnitudes apart from directions (DoRA).")
parser:option("--trainable", "Parameters of the model to train instead of an adapter: a Lua pattern of their paths, or 1-d for norms and biases. "
  .. "With --lora-r: besides it.")
parser:option("--optim", "adamw, adam, sgd, lion, rmsprop, adagrad; _8bit behind, paged_ in front (adamw).")
parser:option("--lr", "Learning rate (2e-4)."):convert(cli.number)
parser:option("--schedule", "linear, cosine, constant, constant_with_warmup, … (linear).")
-- What some schedules take (wane.optim.schedule); given with another, they are refused.
local SCHEDULE = { { "num_cycles", "Waves of the cosine (cosine, cosine_with_min_lr and warmup_stable_decay 0.5; cosine_with_restarts 1).", cli.number },
  { "power", "Of the polynomial (1).", cli.number }, { "lr_end", "Where the polynomial ends (1e-7).", cli.number },
  { "min_lr", "Where the rate ends (cosine_with_min_lr).", cli.number }, { "min_lr_rate", "The same as a share of --lr.", cli.number },
  { "min_lr_ratio", "Share of --lr at both ends (warmup_stable_decay; 0).", cli.number },
  { "num_decay_steps", "Updates in which the rate falls (warmup_stable_decay).", cli.count },
  { "num_stable_steps", "Updates in which it stays (warmup_stable_decay; all that are left).", cli.count },
  { "timescale", "Of inverse_sqrt (the warm-up's updates, or 10000).", cli.number } }
for _, o in ipairs(SCHEDULE) do parser:option("--" .. o[1]:gsub("_", "-"), o[2]):convert(o[3]) end
parser:option("--warmup-steps", "Updates in which the rate rises; below 1: a share of all (0)."):convert(cli.number)
parser:option("--weight-decay", "Of all but norms and biases (0)."):convert(cli.number)
parser:option("--max-steps", "Updates (default: --epochs)."):convert(cli.count)
parser:option("--epochs", "Passes over the data (3)."):convert(cli.number)
parser:option("--batch-size", "Rows at a time (4)."):convert(cli.count)
parser:option("--accumulate", "Batches an update (1)."):convert(cli.count)
parser:option("--max-length", "Longer rows are cut (512, or as many as the model has learned positions for)."):convert(cli.count)
parser:flag("--packing", "Several short rows side by side, none seeing another.")
parser:flag("--group-by-length", "Batches of rows of similar length.")
parser:option("--clip", "Largest norm of an update's gradient; 0: any (1.0)."):convert(cli.number)
parser:flag("--checkpointing", "Keep what enters each layer alone and compute the rest again: less memory, about a third more time.")
parser:option("--save-every", "Updates between checkpoints in --out (default: none)."):convert(cli.count)
parser:option("--save-total-limit", "Checkpoints to keep (all)."):convert(cli.count)
parser:flag("--resume", "Go on from the newest checkpoint in --out.")
parser:option("--eval-data", "Rows held out, of the same kind.")
parser:option("--eval-every", "Updates between evaluations (default: before and after)."):convert(cli.count)
parser:option("--patience", "Stop after so many evaluations without gain."):convert(cli.count)
parser:option("--seed", "Of the adapter, the order of rows and dropout (42)."):convert(cli.count)
parser:option("--log", "JSONL file, a line an update, over nothing but another such log; the curve goes beside it as an SVG (OUT/log.jsonl).")
parser:option("--out", "Folder for the adapter (or the model) and the checkpoints.")

local function names(text)
  if not text or text == "all-linear" then return text end
  local list = {}
  for name in text:gmatch "[^,%s]+" do list[#list + 1] = name end
  return list
end

-- Options that mean an adapter.
local ADAPTER = { "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "use_rslora", "use_dora" }

local function schedule_options(args)
  local options = {}
  for _, o in ipairs(SCHEDULE) do options[o[1]] = args[o[1]] end
  return options
end

-- What a folder may hold that a result would overwrite: an earlier run's, or a model's.
local RESULTS = { "adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors", "model.safetensors.index.json", "best" }

-- Which of these a folder holds, or nil.
local function earlier_result(dir)
  local C = require("wane.core").C
  for _, name in ipairs(RESULTS) do if C.wane_path_kind(dir .. "/" .. name) ~= C.WANE_PATH_NONE then return name end end
end

-- --lora: an adapter that is trained further is as its files say.
local function check_continued(args)
  if #args.lora == 0 then return end
  if #args.lora > 1 then cli.usage "--lora: one adapter is trained further, and several were given" end
  for _, option in ipairs { "lora_r", "trainable", unpack(ADAPTER) } do
    if args[option] ~= nil then cli.usage("--%s: the adapter of --lora is trained further, as its files say: leave this out", (option:gsub("_", "-"))) end
  end
  local folder = cli.check(require("wane.hub").resolve(args.lora[1]))
  if not require("wane.checkpoint.paths").is_file(folder .. "/adapter_config.json") then cli.fail("--lora: '%s' holds no adapter_config.json", folder) end
end

-- Wrong usage is told before anything is read.
local function check(args)
  for _, option in ipairs { "model", "data", "out" } do if not args[option] then cli.usage("--%s is missing", option) end end
  for _, option in ipairs { "lora_r", "batch_size", "accumulate", "max_steps", "max_length", "save_every", "save_total_limit", "eval_every", "patience" } do
    if args[option] == 0 then cli.usage("--%s: a number above 0 was expected", (option:gsub("_", "-"))) end
  end
  for _, option in ipairs { "target_modules", "modules_to_save" } do
    local list = names(args[option])
    if list and #list == 0 then cli.usage("--%s names nothing: expected names with commas between (is a shell variable unset?)", (option:gsub("_", "-"))) end
  end
  for _, option in ipairs(args.trainable and not args.lora_r and ADAPTER or {}) do
    if args[option] ~= nil then
      cli.usage("--%s is an adapter's, and --trainable trains none by itself: give --lora-r too, or leave it out", (option:gsub("_", "-")))
    end
  end
  local earlier = not args.resume and require("wane.train").saves.latest(args.out)
  if earlier then cli.usage("--out: %s is of an earlier run; --resume goes on from it", earlier) end
  local result = not args.resume and earlier_result(args.out)
  if result then cli.usage("--out: '%s' holds %s, an earlier result's or a model's: choose another folder, or remove it", args.out, result) end
  check_continued(args)
  if args.max_length == 1 then cli.usage "--max-length: a number above 1 was expected: a single token has nothing to predict" end
  if args.packing and args.group_by_length then cli.usage "--packing and --group-by-length exclude each other" end
  if (args.eval_every or args.patience) and not args.eval_data then cli.usage "--eval-every and --patience need --eval-data" end
  if args.patience and not args.eval_every then cli.usage "--patience counts evaluations: it needs --eval-every" end
  for _, option in ipairs { "lr", "warmup_steps", "weight_decay", "clip" } do
    local x = args[option]
    if x and not (x >= 0 and x < math.huge) then cli.usage("--%s: a number from 0 on was expected", (option:gsub("_", "-"))) end
  end
  if args.save_total_limit and not args.save_every then cli.usage "--save-total-limit is of the checkpoints that --save-every asks for" end
  if args.epochs and not (args.epochs > 0 and args.epochs < math.huge) then cli.usage "--epochs: a number above 0 was expected" end
  if args.lora_dropout and (args.lora_dropout < 0 or args.lora_dropout >= 1) then cli.usage "--lora-dropout: expected a share in [0, 1)" end
  local make, message = require("wane.optim").by_name(args.optim or "adamw")
  if not make then cli.usage("--optim: %s", message) end
  local ok
  ok, message = pcall(function()
    local o = schedule_options(args)
    o.lr, o.total_steps = 1, 1
    require("wane.optim.schedule").new(args.schedule or "linear", o)
  end)
  if not ok then cli.usage("--schedule: %s", (tostring(message):gsub("^.-schedule: ", ""))) end
  cli.load_options(args)                                                     -- says what is wrong with the model's own
end

-- Attaches the adapter, or makes parameters leaves; says what is trained.
local function choose(model, args)
  local lora = require "wane.lora"
  lora.prepare_for_kbit_training(model, { checkpointing = args.checkpointing or false })
  local attached
  if args.trainable then
    local ok, n = pcall(model.train_parameters, model, args.trainable)
    if not ok then cli.fail("--trainable %s: %s", args.trainable, (tostring(n):gsub("^[^\n:]+%.lua:%d+: ", ""))) end
    if n == 0 then cli.fail("--trainable %s: no parameter of this model is called so (wane inspect lists them)", args.trainable) end
  end
  if args.trainable and not args.lora_r then return false, 0, 0 end
  if args.lora[1] then
    attached = cli.check(lora.load(model, args.lora[1], { trainable = true }))
    for _, name in ipairs(attached.missing) do cli.fail("--lora %s: no values for '%s'", args.lora[1], name) end
  else
    attached = lora.attach(model, { r = args.lora_r, alpha = args.lora_alpha or 16, dropout = args.lora_dropout,
      target_modules = names(args.target_modules), modules_to_save = names(args.modules_to_save), bias = args.bias, use_rslora = args.use_rslora,
      use_dora = args.use_dora, seed = args.seed or 42 })
  end
  if #attached.unused > 0 then cli.note("target modules: nothing in this model is called %s", table.concat(attached.unused, ", ")) end
  local report, trainable, all = lora.trainable_report(model)
  if not args.json then print(report) end
  return true, trainable, all
end

-- A line that is drawn over itself: step, loss, tokens a second, time left, memory.
local function live(args)
  if args.json or not cli.is_terminal() then return nil, function() end end
  local width, drawn, clock = 0, 0, require("wane.core").C.wane_clock
  return function(r, total)
    if clock() - drawn < 0.1 and r.step < total then return end            -- ten times a second is all that an eye, or a slow terminal, takes
    drawn = clock()
    local text = ("step %d/%d  loss %.4f  %.0f tokens/s  %s left  %s"):format(r.step, total, r.loss, r.tokens_per_s, cli.seconds((total - r.step) * r.seconds),
      cli.bytes(r.rss_bytes))
    io.stderr:write("\r", text, (" "):rep(width - #text))
    width = #text
  end, function() io.stderr:write("\r", (" "):rep(width), "\r") end
end

-- ---------------------------------------------------------------- what makes another run

-- What a resumed run must have been started with, beside what the trainer compares.
local SETTINGS = { "model", "data", "text_field", "max_length", "quant", "double_quant", "block_size", "threshold", "skip", "rules",
  "compute", "lora", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "use_rslora", "use_dora", "trainable" }
local LISTS = { skip = true, target_modules = true, modules_to_save = true }

-- The names of a list in one order, each once.
local function in_order(text)
  local list, seen = {}, {}
  for name in text:gmatch "[^,%s]+" do
    if not seen[name] then list[#list + 1] = name end
    seen[name] = true
  end
  table.sort(list)
  return table.concat(list, " ")
end

local function default_length(model) return math.min(512, model:learned_positions() or 512) end

-- What options are when nobody gives them. --lora-r is more than a default beside --trainable: it asks for an adapter.
local function defaults_of(model, args)
  local modules = require("wane.lora.targets").defaults[model.family.name]
  return { text_field = "text", max_length = default_length(model), quant = "none", block_size = args.quant == "int8-blockwise" and 4096 or 64,
    threshold = 6, compute = model.default_compute, lora_r = not args.trainable and 8 or nil, lora_alpha = 16, lora_dropout = 0,
    target_modules = modules and in_order(table.concat(modules, " ")), bias = "none" }
end

-- One text for all ways to say the same: lists in one order, and nothing that is as if nobody had given it. Older versions had more in it:
-- bad_rows, which changes no order of rows (a run that a bad row ended goes on with the others), and what the trainer compares now.
local NOT_HERE = { bad_rows = true, num_decay_steps = true, min_lr = true }
local function canonical(text, defaults)
  local parts = {}
  for name, value in (text .. ", "):gmatch "(%S+) (.-), " do
    if LISTS[name] then value = in_order(value) end
    if value ~= tostring(defaults[name]) and not NOT_HERE[name] then parts[#parts + 1] = name .. " " .. value end
  end
  return table.concat(parts, ", ")
end

-- The settings as a text: the checkpoint's own where that says the same in other words, as older versions wrote it.
local function fingerprint(model, args, rows)
  local parts, defaults, saves = { ("rows %d"):format(rows.count) }, defaults_of(model, args), require("wane.train").saves
  for _, name in ipairs(SETTINGS) do
    local value = args[name]
    if type(value) == "table" then value = table.concat(value, " ") end
    if LISTS[name] then value = in_order(value or "") end
    if name == "model" or name == "data" then value = value:gsub("(.)/+$", "%1") end
    if value ~= nil and value ~= "" then parts[#parts + 1] = ("%s %s"):format(name, tostring(value)) end
  end
  local is, path = canonical(table.concat(parts, ", "), defaults), args.resume and saves.latest(args.out)
  local state = path and saves.state(path)
  local was = state and state.settings.fingerprint
  return type(was) == "string" and canonical(was, defaults) == is and was or is
end

-- ---------------------------------------------------------------- the run

-- What can fail without a model fails before it is loaded, and leaves nothing: the data as far as no tokenizer is needed, the folder, the log.
local function scan(path, args)
  return path and cli.check(require("wane.train").data.scan(path, { text_field = args.text_field, max_length = args.max_length or 512,
    bad_rows = args.bad_rows }))
end
local function log_path(args) return args.log or args.out .. "/log.jsonl" end
local function look(args)
  local train = require "wane.train"
  if args.resume and not train.saves.latest(args.out) then
    local result = earlier_result(args.out)
    cli.fail("there is no checkpoint in '%s' to resume from%s", args.out, result and (", but an earlier result (" .. result
      .. "): without --save-every a run leaves nothing to go on from") or "")
  end
  local rows, held_out = scan(args.data, args), scan(args.eval_data, args)
  cli.check(train.saves.holding(args.out, function() return train.log.can_write(log_path(args), { args.data, args.eval_data }) end))
  return rows, held_out
end

-- What the trainer is told. --out is held by then, until the result is in it.
local function run_options(model, args, rows)
  return {
    lr = args.lr or 2e-4, schedule = args.schedule, warmup_steps = args.warmup_steps, weight_decay = args.weight_decay, max_steps = args.max_steps,
    epochs = args.epochs, batch_size = args.batch_size or 4, accumulate = args.accumulate, packing = args.packing, group_by_length = args.group_by_length,
    schedule_options = schedule_options(args), clip = args.clip, optim = args.optim, seed = args.seed,
    checkpointing = args.checkpointing or false, out = args.out, held = true, save_every = args.save_every, save_total_limit = args.save_total_limit,
    resume = args.resume, log = log_path(args), eval_every = args.eval_every, patience = args.patience,
    cancelled = cli.interrupted, fingerprint = fingerprint(model, args, rows),
  }
end

-- Trains, writes the result, and only then looks at what was held out once more.
local function train(model, tok, args, rows, held_out, save)
  local wane, positions = require "wane", model:learned_positions()
  if positions and (args.max_length or 0) > positions then cli.fail("--max-length %d: the model has learned positions for %d", args.max_length, positions) end
  for _, r in ipairs { rows, held_out } do
    r.max_length = args.max_length or default_length(model)
    cli.check(r:bind(tok, { encoder_decoder = model.encode ~= nil, vocabulary = model.config.vocab_size }))
  end
  local pad = tok and tok.pad_id or 0
  local function evaluate() return held_out and wane.train.evaluate(model, held_out, { batch_size = args.batch_size or 4, pad = pad }) end
  local before = not args.resume and evaluate() or nil
  local options, draw, clear = run_options(model, args, rows), live(args)
  options.eval_rows, options.pad, options.on_update = args.eval_every and held_out, pad, draw
  options.remember = { before = before }
  cli.patient()
  local result = cli.check(wane.train.saves.holding(args.out, function()
    local result, message = wane.train.run(model, rows, options)
    if not result then return nil, message end
    clear()
    local written
    written, message = save()
    if not written then return nil, ("the result was not written to '%s': %s"):format(args.out, tostring(message)) end
    return result
  end))
  cli.patient(false)
  result.signal = cli.interrupted()
  for _, r in ipairs(result.records) do if r.eval_loss and r.step == result.steps then result.after = r end end       -- looked at just now
  if result.signal then cli.note "interrupted: saved, and what is held out was not looked at again"
  elseif not result.after then result.after = evaluate() end
  result.before = result.remember and result.remember.before
  return result
end

-- Whether a file may be written with our curve: it is not there, or it holds one.
local function may_replace(path)
  local f = io.open(path)
  local head = f and f:read(1000)
  if f then f:close() end
  return not f or (head or ""):find(">Loss of ", 1, true) ~= nil
end

-- The curve in the terminal and as an SVG beside the log.
local function show_curve(result, args)
  if #result.curve[1].points + #result.curve[2].points == 0 then return end                -- a finished run, resumed with another log
  local curve, path = require("wane.train").curve, log_path(args):gsub("%.jsonl$", "") .. ".svg"
  local f = may_replace(path) and io.open(path, "w")
  if f then
    f:write(curve.svg(result.curve, "Loss of " .. args.out))
    f:close()
  else
    cli.note("the curve was not written to '%s': %s", path, may_replace(path) and "the file cannot be written" or "another file is there")
  end
  if not args.json then print(curve.terminal(result.curve, math.min(tonumber(os.getenv "COLUMNS") or 80, 120), 10)) end
end

-- What a resumed run says that had nothing left to do.
local function tell_finished(result, args)
  local why = ""
  if result.stopped == "early" then
    why = (": it stopped early, %d evaluations after the best one (step %d, held-out loss %.4f); a larger --patience goes on"):format(result.stale,
      result.best.step, result.best.eval_loss)
  end
  cli.note("'%s' was finished already, with %d updates%s", args.out, result.steps, why)
end

local function tell(result, report, args)
  if result.after then
    print(("held out: perplexity %s -> %.4f"):format(result.before and ("%.4f"):format(result.before.perplexity) or "?", result.after.perplexity))
  end
  print(("%d updates%s in %s, %.0f tokens/s%s, peak memory %s -> %s"):format(result.steps, result.stopped and " (" .. result.stopped .. ")" or "",
    cli.seconds(result.seconds), result.tokens_per_s, result.loss and (", loss %.4f"):format(result.loss) or "", cli.bytes(report.peak_rss_bytes), args.out))
end

cli.run(parser, function(args)
  check(args)
  local wane = require "wane"
  local rows, held_out = look(args)
  local model, tok = cli.load_model(setmetatable({ lora = {} }, { __index = args }))       -- choose() sees to the adapter
  if not tok then cli.note("no tokenizer: %s", tostring(model.tokenizer_error)) end
  local adapter, trainable, all = choose(model, args)
  local result = train(model, tok, args, rows, held_out, function()
    if adapter then return wane.lora.save(model, args.out) end
    return model:save(args.out)
  end)
  show_curve(result, args)
  for _, r in ipairs { rows, held_out } do
    local of = r == rows and "" or " of --eval-data"
    if r.bad > 0 then cli.note("%d row(s)%s left out, such as line %d: %s", r.bad, of, r.skipped[1].line, r.skipped[1].reason) end
    if r.truncated > 0 then cli.note("%d row(s)%s cut to --max-length", r.truncated, of) end
  end
  local skipped = 0
  for _, r in ipairs(result.records) do skipped = skipped + (r.skipped and 1 or 0) end
  if skipped > 0 then cli.note("%d update(s) skipped: their loss or gradients were not finite", skipped) end
  local report = { steps = result.steps, loss = result.loss, seconds = result.seconds, tokens_per_s = result.tokens_per_s,
    peak_rss_bytes = wane.memory().rss_peak, trainable = trainable, all = all, stopped = result.stopped, best = result.best, finished = result.finished,
    perplexity_before = result.before and result.before.perplexity, perplexity_after = result.after and result.after.perplexity }
  if result.finished then tell_finished(result, args) end
  if args.json then cli.json(report) else tell(result, report, args) end
  if result.signal then                                                      -- a script should not take this for a whole run
    io.stdout:flush()
    os.exit(128 + result.signal)
  end
end)
