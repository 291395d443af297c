--- Reads the arguments of `wane`: no argument is the REPL, a name is a command of scripts/, a path is a Lua program.
-- Run by main.c with the home folder; returns the exit status.
local home = ...

for _, name in ipairs { "session", "editor", "history", "complete", "docstrings", "help", "show", "trace" } do
  package.preload["wane.repl." .. name] = function(...) return assert(loadfile(home .. "/repl/" .. name .. ".lua"))(...) end
end
local trace = require "wane.repl.trace"
local terminal = require "wane.terminal"

-- First line of every command of scripts/: "--- wane NAME: what it does."
local function commands()
  local uv = require "luv"
  local list = {}
  local folder = uv.fs_scandir(home .. "/scripts")
  while folder do
    local file = uv.fs_scandir_next(folder)
    if not file then break end
    local name = file:match "^([%w-]+)%.lua$"
    local source = name and io.open(home .. "/scripts/" .. file)
    if source then
      local summary = (source:read "*l" or ""):match "^%-%-%- wane [%w-]+: (.*)$"
      source:close()
      if summary then list[#list + 1] = { name = name, summary = summary } end
    end
  end
  table.sort(list, function(a, b) return a.name < b.name end)
  return list
end

local function usage(out)
  out:write [[
usage: wane                        interactive session
       wane FILE.lua [args]        run a Lua program
       wane -e CODE [args]         run a line of Lua
       wane COMMAND [options]      one of the commands below; each has --help
       wane --help | --version

]]
  for _, command in ipairs(commands()) do out:write(("  %-10s %s\n"):format(command.name, command.summary)) end
  out:write "\nDocumentation: README.md and docs/ beside the program.\n"
end

-- The arguments after position n become the program's own, under the name `name`.
local function shift(n, name)
  local shifted = { [0] = name }
  for i = n + 1, #arg do shifted[i - n] = arg[i] end
  shifted[-1] = arg[0]
  rawset(_G, "arg", shifted)
end

-- Runs a chunk as a program: errors go to stderr with the user's frames, status 1; ctrl-C is 130.
local function run(chunk, message)
  if not chunk then
    io.stderr:write("wane: ", message, "\n")
    return 1
  end
  local ok, problem = xpcall(chunk, trace.handler, unpack(arg))
  io.stdout:flush()
  if ok then return 0 end
  if terminal.interrupted() then
    io.stderr:write "wane: interrupted\n"
    return 130
  end
  if problem then io.stderr:write(problem:find "^wane: " and "" or "wane: ", problem, "\n") end
  return 1
end

local function readable(path)
  local f = io.open(path, "rb")
  if f then f:close() end
  return f ~= nil
end

local first = arg[1]
if first == nil then
  return require("wane.repl.session").run(home)
elseif first == "--help" or first == "-h" then
  usage(io.stdout)
  return 0
elseif first == "--version" or first == "-v" then
  local core = require "wane.core"
  local ffi = require "ffi"
  print(("wane %s (%s, %s)"):format(ffi.string(core.C.wane_version()), jit.version, ffi.string(core.C.wane_cpu_level_name(core.C.wane_cpu_level()))))
  return 0
elseif first == "-e" then
  local code = arg[2]
  if not code then
    io.stderr:write "wane: -e needs a line of Lua\n"
    return 2
  end
  shift(2, "-e")
  return run(loadstring(code, "=-e"))
elseif first:find "^%-" and first ~= "-" then
  io.stderr:write("wane: there is no option ", first, "\n\n")
  usage(io.stderr)
  return 2
end

local command = first:find "^[%w-]+$" and home .. "/scripts/" .. first .. ".lua"
if command and readable(command) then
  shift(1, command)
  return run(loadfile(command))
elseif first == "-" or readable(first) then
  shift(1, first)
  return run(loadfile(first ~= "-" and first or nil))
end
io.stderr:write(("wane: '%s' is neither a command nor a readable file\n\n"):format(first))
usage(io.stderr)
return first:find "%.lua$" and 1 or 2
