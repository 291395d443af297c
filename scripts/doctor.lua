--- wane doctor: what this machine offers, and what is slow about it.
local ffi = require "ffi"
local cli = require "wane.cli"

local parser = cli.parser("doctor", "Shows what this machine offers to wane and what is slow about it. Measures nothing: that is `wane bench`.")

-- What the core's notes on a CPU mean to a user.
local meanings = {
  ["bf16-dot-slow"] = "the bf16 dot product of AVX-512 is slower here than widening to f32; wane widens",
  ["prefetch-pays"] = "weights are read faster with software prefetch; wane prefetches",
}

-- First line of a small file, or nil.
local function first_line(path)
  local file = io.open(path, "r")
  if not file then return nil end
  local line = file:read "*l"
  file:close()
  return line
end

-- Processors that the kernel shows, and whether a hypervisor stands between.
local function processors()
  local count, virtual = 0, false
  local file = io.open("/proc/cpuinfo", "r")
  if not file then return nil, false end
  for line in file:lines() do
    if line:find "^processor%s*:" then count = count + 1 end
    if line:find "^flags" and line:find " hypervisor" then virtual = true end
  end
  file:close()
  return count, virtual
end

-- Physical memory and swap in bytes.
local function memory_of_machine()
  local found = {}
  local file = io.open("/proc/meminfo", "r")
  if not file then return found end
  for line in file:lines() do
    local name, kib = line:match "^(%w+):%s+(%d+) kB"
    if name then found[name] = tonumber(kib) * 1024 end
  end
  file:close()
  return found
end

-- Shared libraries that carry weight here, by the version in the file name that the loader resolved.
local function libraries(core)
  local wanted = { "libwane", "libluajit", "libuv", "libyajl", "libpcre2", "libutf8proc", "libc%." }
  local list, seen = {}, {}
  local uv = require "luv"
  local file = io.open("/proc/self/maps", "r")
  if not file then return list end
  for line in file:lines() do
    local path = line:match "(/%S+%.so[%d.]*)$"
    local name = path and path:match "[^/]+$"
    for _, pattern in ipairs(name and not seen[name] and wanted or {}) do
      if name:find("^" .. pattern) then
        seen[name] = true
        list[#list + 1] = { name = name, path = path }
      end
    end
  end
  file:close()
  table.sort(list, function(a, b) return a.name < b.name end)
  for _, l in ipairs(list) do
    if l.name:find "^libuv" then l.version = uv.version_string() end
    if l.name:find "^libwane" then l.version = ffi.string(core.C.wane_version()) end
    if l.name:find "^libluajit" then l.version = jit.version end
  end
  return list
end

-- Which instruction set serves which op. Ops of memory management have nothing to vectorise.
local function ops(core)
  local C, name = core.C, ffi.new "const char *[1]"
  local plain = { release = true, upload = true, op = true }
  local by_origin, fallback, seen = {}, {}, {}
  for code = 0, 1023 do
    local origin = C.wane_op_origin(code, name)
    if origin ~= nil and name[0] ~= nil then
      local op, where = ffi.string(name[0]), ffi.string(origin)
      by_origin[where] = (by_origin[where] or 0) + 1
      if where == "generic" and not plain[op] and not seen[op] then
        seen[op] = true
        fallback[#fallback + 1] = op
      end
    end
  end
  return by_origin, fallback
end

-- What is slow or in the way, in sentences.
local function troubles(report)
  local list = {}
  local function say(...) list[#list + 1] = string.format(...) end
  for note in report.cpu.notes:gmatch "%S+" do say("%s: %s", note, meanings[note] or "see docs") end
  if report.cpu.level == "generic" then say "no vector instructions are used: everything runs on the portable reference, some ten times slower" end
  if report.cpu.level ~= report.cpu.best then say("WANE_CPU lowers the instruction set from %s to %s", report.cpu.best, report.cpu.level) end
  local wanted = os.getenv "WANE_CPU"
  if wanted and wanted ~= report.cpu.level then
    say("WANE_CPU=%s has no effect: it is no level below %s (generic, avx2, avx512, avx512bf16, amx)", wanted, report.cpu.best)
  end
  if report.cpu.processors and report.threads < report.cpu.processors then
    say("%d of %d processors may be used (affinity or a cgroup's quota)", report.threads, report.cpu.processors)
  end
  if report.cpu.virtual then say "a virtual machine: neighbours may take time away; measure more than once" end
  if report.cpu.governor and report.cpu.governor ~= "performance" then say("the frequency governor is '%s'", report.cpu.governor) end
  if report.memory.physical and report.memory.limit < report.memory.physical * 0.99 then
    say("a cgroup limits memory to %s of %s", cli.bytes(report.memory.limit), cli.bytes(report.memory.physical))
  end
  if report.memory.huge_pages and not report.memory.huge_pages:find "%[always%]" and not report.memory.huge_pages:find "%[madvise%]" then
    say "transparent huge pages are off: large weights cost more address look-ups"
  end
  if #report.ops.fallback > 0 and report.cpu.level ~= "generic" then
    say("these ops have only the portable reference at this level: %s", table.concat(report.ops.fallback, ", "))
  end
  if not jit.status() then say "LuaJIT's compiler is off" end
  return list
end

local function gather()
  local core = require "wane.core"
  local wane = require "wane"
  local C = core.C
  local count, virtual = processors()
  local machine, memory = memory_of_machine(), wane.memory()
  local by_origin, fallback = ops(core)
  local report = {
    cpu = { name = ffi.string(C.wane_cpu_name()), notes = ffi.string(C.wane_cpu_notes()), processors = count, virtual = virtual,
            level = ffi.string(C.wane_cpu_level_name(C.wane_cpu_level())), best = ffi.string(C.wane_cpu_level_name(C.wane_cpu_best())),
            governor = first_line "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor" },
    threads = wane.threads(),
    memory = { limit = memory.limit, physical = machine.MemTotal, available = machine.MemAvailable, swap = machine.SwapTotal,
               huge_pages = first_line "/sys/kernel/mm/transparent_hugepage/enabled" },
    kernel = first_line "/proc/sys/kernel/osrelease",
    libraries = libraries(core),
    ops = { by_level = by_origin, fallback = fallback },
  }
  report.troubles = troubles(report)
  return report
end

local function print_report(r)
  local function line(name, ...) print(("%-14s %s"):format(name, string.format(...))) end
  line("processor", "%s, %s", r.cpu.name, r.cpu.processors and ("%d seen by the kernel"):format(r.cpu.processors) or "unknown number")
  line("instructions", "%s%s", r.cpu.level, r.cpu.best ~= r.cpu.level and (" (the processor has %s)"):format(r.cpu.best) or "")
  line("threads", "%d", r.threads)
  line("memory", "%s may be used%s%s", cli.bytes(r.memory.limit), r.memory.available and ", " .. cli.bytes(r.memory.available) .. " available" or "",
    r.memory.swap and r.memory.swap > 0 and ", swap " .. cli.bytes(r.memory.swap) or ", no swap")
  line("kernel", "Linux %s", r.kernel or "?")
  local levels = {}
  for origin, n in pairs(r.ops.by_level) do levels[#levels + 1] = ("%d %s"):format(n, origin) end
  table.sort(levels)
  line("kernels", "%s", table.concat(levels, ", "))
  for i, l in ipairs(r.libraries) do line(i == 1 and "libraries" or "", "%s%s", l.path, l.version and " (" .. l.version .. ")" or "") end
  print(#r.troubles == 0 and "\nnothing to complain of" or "\nslow or in the way:")
  for _, trouble in ipairs(r.troubles) do print("  - " .. trouble) end
end

cli.run(parser, function(args)
  local report = gather()
  if args.json then cli.json(report) else print_report(report) end
end)
