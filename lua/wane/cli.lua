--- What the commands under scripts/ have in common: options, errors with the right exit status, progress, JSON.
--
-- A command reads:
--
--    --- wane generate: continues a prompt.
--    local cli = require "wane.cli"
--    local parser = cli.parser("generate", "Continues a prompt.")
--    cli.model_options(parser)                                 -- --model --quant … --threads --json
--    parser:option("--max-new-tokens", "New tokens at most."):convert(cli.count)
--    cli.run(parser, function(args)                            -- wrong usage: status 2; any error: stderr, status 1
--      if args.beams then cli.later("--beams", "beam search") end
--      local model, tok, load_s = cli.load_model(args)         -- with a progress line where stderr is a terminal
--      for piece in … do cli.out(piece) end
--      if args.json then cli.json { text = text, ids = ids } end
--    end)
--
-- Status 0 is success, 1 a failure (one line on stderr), 2 wrong usage, 130 ctrl-C (143 and 129: SIGTERM and SIGHUP, also where a command
-- ends in order by them). Only results go to stdout.
-- @module wane.cli
local ffi = require "ffi"
local argparse = require "argparse"

local M = {}

ffi.cdef "int isatty(int); int ferror(void *);"

local program = "wane"                                  -- "wane generate" once a parser was made
local terminal = package.preload["wane.terminal"] and require "wane.terminal"   -- only inside bin/wane
local active_progress                                   -- the progress line on the screen now, or nil
local patient = false                                   -- signals are noted, and break nothing

-- ---------------------------------------------------------------- usage and errors

-- What was written must have arrived: a full disk is an error, not the end of a success.
local function flush_stdout()
  local ok, message = io.stdout:flush()
  if ok and ffi.C.ferror(io.stdout) == 0 then return end
  io.stderr:write(program, ": cannot write to stdout: ", message or "an earlier write failed", "\n")
  os.exit(1)
end

--- Parser of a command's options (lua-argparse). Wrong usage exits with status 2.
-- @param name string "generate"
-- @param description string one sentence
-- @return table argparse parser with --json
function M.parser(name, description)
  program = "wane " .. name
  local parser = argparse(program, description)
  parser.error = function(_, message)
    io.stderr:write(program, ": ", message, " (", program, " --help lists the options)\n")
    os.exit(2)
  end
  parser:flag("--json", "One JSON object on stdout.")
  return parser
end

--- Ends the program with a message on stderr and status 1 (after ctrl-C, but for a patient command: 130, whatever it broke).
-- @param message string a format, with its arguments
function M.fail(message, ...)
  if active_progress then active_progress:clear() end
  if select("#", ...) > 0 then message = message:format(...) end
  io.stdout:flush()
  local signal = not patient and M.interrupted()
  if signal then
    io.stderr:write(program, ": interrupted\n")
    os.exit(128 + signal)
  end
  io.stderr:write(program, ": ", message, "\n")
  os.exit(1)
end

--- Ends the program with a message on stderr and status 2: the command line asks for something that makes no sense.
-- @param message string a format, with its arguments
function M.usage(message, ...)
  if select("#", ...) > 0 then message = message:format(...) end
  io.stderr:write(program, ": ", message, "\n")
  os.exit(2)
end

--- Ends the program with status 2: the option is known but not built yet.
-- @param option string "--beams"
-- @param what string|nil what it would do, in words
function M.later(option, what)
  M.usage("%s%s is not part of this version yet", option, what and (" (" .. what .. ")") or "")
end

--- Like assert for functions that return nil, message: ends the program instead of raising.
-- @return the values, when the first is true
function M.check(...)
  local value, message = ...
  if not value then M.fail("%s", tostring(message)) end
  return ...
end

-- The message of an error without the place in the sources where it was raised; commands speak to users.
local function plain(message)
  message = tostring(message)
  return (message:gsub("^[^\n:]+%.lua:%d+: ", ""))
end

--- Parses the command line and runs the command. Errors end with status 1 (WANE_TRACE=1 adds a traceback), ctrl-C with 130.
-- @param parser table from M.parser
-- @param body function called with the table of arguments
function M.run(parser, body)
  local args = parser:parse(_G.arg)
  M.watch_interrupts()
  local function handler(message)
    if os.getenv "WANE_TRACE" == "1" then return debug.traceback(tostring(message), 2) end
    return plain(message)
  end
  local ok, message = xpcall(body, handler, args)
  if active_progress then active_progress:clear() end
  if not ok then M.fail("%s", message) end
  flush_stdout()                                        -- of what print() left
end

--- The signal that asks the command to end: ctrl-C, in a patient command SIGTERM and SIGHUP too (inside bin/wane; plain luajit ends by itself).
-- @return integer|boolean its number (2, 15, 1), or false
function M.interrupted()
  return terminal ~= nil and terminal.interrupted()
end

--- From here on a first ctrl-C, SIGTERM and SIGHUP are only noted (M.interrupted): the command ends what it is doing in order; a second ctrl-C
-- ends the program.
-- @param flag boolean|nil false: they have their usual effects again
function M.patient(flag)
  patient = flag ~= false
  if terminal then terminal.patient(patient) end
end

--- After an error that ctrl-C caused and the command survives: waits for what was cancelled and forgets the ctrl-C.
function M.settle()
  if terminal then terminal.clear_interrupt() end
  local core = package.loaded["wane.core"]
  if type(core) ~= "table" then return end             -- the REPL runs without the library too
  local C, s = core.C, core.stream()
  C.wane_scope_swap(s, nil)
  -- Polling takes the cancellation's report off the stream.
  while C.wane_stream_poll(s, C.wane_stream_tail(s)) == C.WANE_PENDING do C.wane_stream_wait(s, C.wane_stream_tail(s), 100000000) end
end

--- Calls wane_stream_cancel on this state's stream when ctrl-C is pressed (inside bin/wane).
function M.watch_interrupts()
  if not terminal then return end
  local core = require "wane.core"
  local function address(pointer) return tonumber(ffi.cast("uintptr_t", pointer)) end
  terminal.on_interrupt(address(core.C.wane_stream_cancel), address(core.stream()))
end

-- ---------------------------------------------------------------- values

--- Converter for argparse: a whole number >= 0.
-- @return integer|nil, string|nil
function M.count(text)
  local n = tonumber(text)
  if not n or n < 0 or n ~= math.floor(n) then return nil, ("'%s' is not a whole number"):format(text) end
  return n
end

--- Converter for argparse: any finite number.
-- @return number|nil, string|nil
function M.number(text)
  local n = tonumber(text)
  if not n or n ~= n or math.abs(n) == math.huge then return nil, ("'%s' is not a number"):format(text) end
  return n
end

--- Converter for argparse: "1,2,3" as a list of whole numbers.
-- @return integer[]|nil, string|nil
function M.ids(text)
  local list = {}
  for item in (text .. ","):gmatch "%s*(.-)%s*," do
    local n, message = M.count(item)
    if not n then return nil, message end
    list[#list + 1] = n
  end
  return list
end

local binary = { B = 1, K = 2^10, KIB = 2^10, M = 2^20, MIB = 2^20, G = 2^30, GIB = 2^30, T = 2^40, TIB = 2^40,
                 KB = 1e3, MB = 1e6, GB = 1e9, TB = 1e12 }

--- Converter for argparse: "10GiB", "512M" (binary), "2GB" (decimal) or plain bytes as a number of bytes.
-- @return number|nil, string|nil
function M.size(text)
  local value, unit = text:match "^%s*([%d%.]+)%s*(%a*)%s*$"
  local factor = binary[unit == "" and "B" or (unit or ""):upper()]
  value = tonumber(value)
  if not value or not factor then return nil, ("'%s' is not a size such as 10GiB or 512M"):format(text) end
  return math.floor(value * factor)
end

--- Bytes for people: "135.1 MB", "1.25 GB" (decimal units, as download pages and disks count).
-- @param n number
-- @return string
function M.bytes(n)
  for _, unit in ipairs { { 1e12, "TB" }, { 1e9, "GB" }, { 1e6, "MB" }, { 1e3, "kB" } } do
    if n >= unit[1] then
      local v = n / unit[1]
      return (v < 10 and "%.2f %s" or "%.1f %s"):format(v, unit[2])
    end
  end
  return ("%d B"):format(n)
end

--- Seconds for people: "0.25 s", "12.3 s", "4 min 5 s".
-- @param s number
-- @return string
function M.seconds(s)
  if s < 10 then return ("%.2f s"):format(s) end
  if s < 60 then return ("%.1f s"):format(s) end
  return ("%d min %d s"):format(math.floor(s / 60), math.floor(s % 60))
end

-- ---------------------------------------------------------------- output

--- Writes a piece of streamed text to stdout at once.
-- @param piece string
function M.out(piece)
  if active_progress then active_progress:clear() end
  io.stdout:write(piece)
  flush_stdout()
end

--- A line for people on stderr (never with --json's result, which is alone on stdout).
-- @param message string a format, with its arguments
function M.note(message, ...)
  if active_progress then active_progress:clear() end
  if select("#", ...) > 0 then message = message:format(...) end
  io.stderr:write(message, "\n")
end

--- Text from stdin, for commands whose --prompt or --text was left out. Asks at a terminal would look like a hang: wrong usage.
-- @param option string the option that was left out
-- @return string
function M.stdin(option)
  if ffi.C.isatty(0) ~= 0 then M.usage("%s is missing, and stdin is a terminal: give %s or pipe text in", option, option) end
  return io.stdin:read "*a"
end

local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t", ["\b"] = "\\b", ["\f"] = "\\f" }
local function quote(s)
  return '"' .. s:gsub('[%z\1-\31"\\\127]', function(c) return escapes[c] or ("\\u%04x"):format(c:byte()) end) .. '"'
end

-- Appends the JSON of a value to a list of strings.
local function encode(value, out)
  local kind = type(value)
  if kind == "table" and (#value > 0 or next(value) == nil) then
    out[#out + 1] = "["
    for i, item in ipairs(value) do
      if i > 1 then out[#out + 1] = "," end
      encode(item, out)
    end
    out[#out + 1] = "]"
  elseif kind == "table" then
    local keys = {}
    for key in pairs(value) do keys[#keys + 1] = tostring(key) end
    table.sort(keys)
    out[#out + 1] = "{"
    for i, key in ipairs(keys) do
      out[#out + 1] = (i > 1 and "," or "") .. quote(key) .. ":"
      encode(value[key], out)
    end
    out[#out + 1] = "}"
  elseif kind == "number" then
    -- JSON knows no infinities; 17 digits give every double back.
    if value ~= value or math.abs(value) == math.huge then out[#out + 1] = "null"
    elseif value == math.floor(value) and math.abs(value) < 2^53 then out[#out + 1] = ("%d"):format(value)
    else out[#out + 1] = ("%.17g"):format(value) end
  elseif kind == "boolean" then out[#out + 1] = tostring(value)
  elseif kind == "string" then out[#out + 1] = quote(value)
  else out[#out + 1] = "null" end
end

--- A value as JSON: keys sorted, an empty table is a list, NaN and infinities are null, 64-bit integers must be made numbers first.
-- @param value table|string|number|boolean|nil
-- @return string
function M.to_json(value)
  local out = {}
  encode(value, out)
  return table.concat(out)
end

--- Prints the command's result for --json: one object, one line, on stdout.
-- @param object table
function M.json(object)
  io.stdout:write(M.to_json(object), "\n")
  flush_stdout()
end

--- Aligned columns for people.
-- @param rows table list of lists of strings or numbers; the first is the heading
-- @return string
function M.columns(rows)
  local widths, lines = {}, {}
  for _, row in ipairs(rows) do
    for i, cell in ipairs(row) do widths[i] = math.max(widths[i] or 0, #tostring(cell)) end
  end
  for _, row in ipairs(rows) do
    local cells = {}
    for i, cell in ipairs(row) do
      local pad = (" "):rep(widths[i] - #tostring(cell))
      cells[i] = type(cell) == "number" and pad .. cell or tostring(cell) .. pad
    end
    lines[#lines + 1] = (table.concat(cells, "  "):gsub("%s+$", ""))
  end
  return table.concat(lines, "\n")
end

-- ---------------------------------------------------------------- progress

local Progress = {}
Progress.__index = Progress

--- Is stderr a terminal?
-- @return boolean
function M.is_terminal() return ffi.C.isatty(2) == 1 end

--- A progress line on stderr, drawn only where stderr is a terminal and at most ten times a second.
-- @param label string "loading model.gguf"
-- @param unit string|nil "bytes" (default) or what is counted, "windows"
-- @return table with :update(done, total, tensors), :clear(), :finish()
function M.progress(label, unit)
  local visible = ffi.C.isatty(2) ~= 0 and os.getenv "TERM" ~= "dumb"
  return setmetatable({ label = label, unit = unit or "bytes", visible = visible }, Progress)
end

--- Shows how far things are. total may be 0 or nil while unknown; `tensors`, where given, is shown beside the bytes.
function Progress:update(done, total, tensors)
  if not self.visible then return end
  local now = require("wane.core").C.wane_clock()
  self.first = self.first or now
  if self.clock and now - self.clock < 0.1 then return end
  self.clock = now
  active_progress = self
  local count = self.unit == "bytes" and M.bytes or function(n) return ("%d"):format(n) end
  local elapsed = now - self.first
  local text = { self.label, " " }
  if total and total > 0 then
    local share = math.min(done / total, 1)
    local filled = math.floor(share * 24)
    text[#text + 1] = ("[%s%s] %3d %%  %s of %s"):format(("="):rep(filled), (" "):rep(24 - filled), math.floor(share * 100), count(done), count(total))
  else
    text[#text + 1] = count(done)
  end
  if tensors then text[#text + 1] = ("  %d tensors"):format(tensors) end
  if elapsed > 0.3 and done > 0 then text[#text + 1] = ("  %s%s/s"):format(count(done / elapsed), self.unit == "bytes" and "" or " " .. self.unit) end
  io.stderr:write("\r\27[K", table.concat(text))
  io.stderr:flush()
end

--- Takes the line off the screen; the next update draws it again.
function Progress:clear()
  if active_progress == self then
    active_progress = nil
    io.stderr:write "\r\27[K"
    io.stderr:flush()
  end
end

--- The end: takes the line off the screen.
function Progress:finish()
  self:clear()
end

-- ---------------------------------------------------------------- models

--- Adds the options that say which model, how quantized and where it runs.
-- @param parser table
function M.model_options(parser)
  parser:option("--model", "A name in the Hugging Face cache (see wane pull), a Hugging Face folder (a model's or an adapter's), a .gguf file, or "
    .. "a folder quantized by bitsandbytes or wane.")
  parser:option("--quant", "Scheme of the linear layers."):choices { "none", "nf4", "fp4", "int8", "int8-blockwise" }
  parser:option("--block-size", "Values that share a scale (64)."):convert(M.count)
  parser:flag("--double-quant", "Quantize the scales too.")
  parser:option("--threshold", "LLM.int8(): columns with a larger activation stay 16-bit (6.0)."):convert(M.number)
  parser:option("--skip", "Module left as it is; may be given several times."):count "*"
  parser:option("--rules", "File of lines PATTERN SCHEME [block_size=N]: the first that matches a layer's path decides, --quant is for the rest.")
  parser:option("--compute", "Precision of products: f32, bf16, f16."):choices { "f32", "bf16", "f16", "fast" }
  parser:option("--threads", "Workers (default: what affinity and cgroups allow)."):convert(M.count)
  parser:option("--device-map", "Not part of this version yet.")
  parser:option("--max-memory", "Not part of this version yet."):count "*"
  parser:option("--lora", "Adapter's folder, or NAME=FOLDER; may be given several times: their changes add up."):count "*"
end

-- What --lora was given, as wane.load takes it.
local function adapters_of(given)
  local list = {}
  for _, text in ipairs(given) do
    local name, dir = text:match "^([%w_-]+)=(.+)$"
    if name and list[name] then M.usage("--lora: '%s' is named twice", name) end
    if name then list[name] = dir else list[#list + 1] = text end
  end
  return next(list) and list or nil
end

--- The options that wane.load takes, from those of M.model_options.
-- @param args table
-- @return table
function M.load_options(args)
  if args.device_map and args.device_map ~= "cpu" then M.later("--device-map " .. args.device_map, "placement on several devices") end
  if args.max_memory and #args.max_memory > 0 then M.later("--max-memory", "placement on several devices") end
  local options = { compute = args.compute, lora = adapters_of(args.lora or {}) }
  local rules = args.rules and M.check(require("wane.quant.rules").read(args.rules))
  if rules or (args.quant and args.quant ~= "none") then
    local four_bit = args.quant == "nf4" or args.quant == "fp4"
    if args.double_quant and not four_bit and not rules then M.usage("--double-quant is for nf4 and fp4, not %s", args.quant) end
    if args.threshold and args.quant ~= "int8" and not rules then M.usage("--threshold is for int8, not %s", args.quant) end
    options.quant = { type = args.quant or "none", block_size = args.block_size, double_quant = args.double_quant, threshold = args.threshold,
                      skip = args.skip and #args.skip > 0 and args.skip or nil, compute = args.compute, rules = rules }
  elseif args.block_size or args.double_quant or args.threshold or (args.skip and #args.skip > 0) then
    M.usage "--block-size, --double-quant, --threshold and --skip need --quant"
  end
  return options
end

--- Loads the model that the options name; ends the program with status 1 where that fails.
-- @param args table from a parser with M.model_options
-- @return table, table, number model, tokenizer, seconds
function M.load_model(args)
  if not args.model then M.usage "--model is missing: a folder or a .gguf file" end
  local options = M.load_options(args)
  local wane, core = require "wane", require "wane.core"
  if args.threads then core.check(core.C.wane_set_threads(args.threads)) end
  local progress = M.progress("loading " .. args.model:match "[^/]*/*$")
  options.progress = function(...) progress:update(...) end
  options.cancelled = M.interrupted
  local started = core.C.wane_clock()
  local model, tokenizer = M.check(wane.load(args.model, options))
  progress:finish()
  for _, warning in ipairs(model.warnings) do M.note("%s", warning) end
  return model, tokenizer, core.C.wane_clock() - started
end

return M
