--- Writes docs/api.md from the docstrings of lua/wane; with --check only tells what is missing or out of date (status 1).
-- For developers: luajit scripts/docs.lua [--check]
local docstrings = dofile "repl/docstrings.lua"

local OUT = "docs/api.md"

-- Chapters and their files in reading order; what no pattern names comes last.
local chapters = {
  { "The library", { "init", "load", "model", "generate/init", "evaluate", "plan", "convert" } },
  { "Tensors", { "tensor", "tensor/.*" } },
  { "Layers and models", { "nn/.*", "models/.*" } },
  { "Quantization", { "quant", "quant/.*" } },
  { "Gradients", { "autograd", "autograd/.*" } },
  { "Adapters", { "lora", "lora/.*" } },
  { "Files and text", { "checkpoint", "checkpoint/.*", "hub", "hub/.*", "loader", "tokenizer", "tokenizer/.*" } },
  { "Hosts and plumbing", { "core", "host/.*", "cli", "bench" } },
}

-- Every Lua file below a folder, by its path without the folder and ".lua", sorted.
local function lua_files(folder)
  local pipe = assert(io.popen(("cd %s && find . -name '*.lua' | LC_ALL=C sort"):format(folder)))
  local list = {}
  for line in pipe:lines() do list[#list + 1] = line:match "^%./(.*)%.lua$" end
  pipe:close()
  return list
end

-- "generate/init" is required as wane.generate.
local function module_name(file)
  local name = ("wane." .. file:gsub("/", ".")):gsub("%.init$", "")
  return name
end

-- What a layer inherits from wane.nn.module's Module is described there.
local inherited = { new = true, forward = true, describe = true }

-- Functions that a user may call: members of what the file returns or of a class (a capital letter), not named with an underscore.
local function public(entries)
  local list = {}
  for _, entry in ipairs(entries) do
    local base, name = entry.name:match "^([%w_.]+)[.:]([%w_]+)$"
    local reachable = base and not entry.is_local and entry.parameters and (base == entries.returned or base:find "^%u%l" ~= nil)
    if reachable and not name:find "^_" and (entry.documented or not inherited[name]) then list[#list + 1] = entry end
  end
  return list
end

-- "M.load" of wane.cli is shown as "cli.load"; classes keep their names.
local function shown_name(entry, module)
  return (entry.name:gsub("^M([.:])", module:match "[%w_]+$" .. "%1"))
end

local function write_function(out, entry, module)
  out[#out + 1] = ("#### `%s%s`\n"):format(shown_name(entry, module), entry.parameters)
  if entry.text ~= "" then out[#out + 1] = entry.text .. "\n" end
  local tags = {}
  for _, p in ipairs(entry.params) do tags[#tags + 1] = ("- `%s` %s"):format(p.name, p.what) end
  for _, r in ipairs(entry.returns) do tags[#tags + 1] = "- returns " .. r.what end
  if #tags > 0 then out[#out + 1] = table.concat(tags, "\n") .. "\n" end
end

-- One module: its header, then its functions.
local function write_module(out, file, missing)
  local path = "lua/wane/" .. file .. ".lua"
  local entries = assert(docstrings.lua_file(path))
  local functions = public(entries)
  local module = module_name(file)
  if not entries.header then missing[#missing + 1] = path .. ":1: the file does not say what it is" end
  out[#out + 1] = ("### %s\n"):format(module)
  out[#out + 1] = (entries.header or "") .. "\n"
  for _, entry in ipairs(functions) do
    if not entry.documented then missing[#missing + 1] = ("%s:%d: %s has no docstring"):format(path, entry.line, entry.name) end
    write_function(out, entry, module)
  end
end

local function generate()
  local out = { "# Lua API\n",
    "Made from the docstrings by scripts/docs.lua; `?name` shows the same in the REPL. The C API is described in core/include/wane.h.\n" }
  local missing, files, done = {}, lua_files "lua/wane", {}
  chapters[#chapters + 1] = { "More", { ".*" } }
  for _, chapter in ipairs(chapters) do
    local begun = false
    for _, pattern in ipairs(chapter[2]) do
      for _, file in ipairs(files) do
        if not done[file] and file:find("^" .. pattern .. "$") then
          if not begun then out[#out + 1] = ("## %s\n"):format(chapter[1]) end
          begun, done[file] = true, true
          write_module(out, file, missing)
        end
      end
    end
  end
  for _, entry in ipairs(docstrings.c_header "core/include/wane.h") do
    if not entry.documented then missing[#missing + 1] = ("core/include/wane.h:%d: %s has no comment"):format(entry.line, entry.name) end
  end
  return table.concat(out, "\n"), missing
end

local text, missing = generate()
for _, line in ipairs(missing) do io.stderr:write(line, "\n") end
if arg[1] == "--check" then
  local file = io.open(OUT, "r")
  local old = file and file:read "*a"
  if file then file:close() end
  if old ~= text then io.stderr:write(OUT, " is out of date: run luajit scripts/docs.lua\n") end
  os.exit((old == text and #missing == 0) and 0 or 1)
elseif arg[1] then
  io.stderr:write "usage: luajit scripts/docs.lua [--check]\n"
  os.exit(2)
end
local file = assert(io.open(OUT, "w"))
file:write(text)
file:close()
os.exit(#missing == 0 and 0 or 1)
