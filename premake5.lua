-- The build: `premake4 --file=premake5.lua gmake` (Debian's 4.3) or `premake5 gmake`, then `make -C build config=release`.
-- Gives lib/libwane.so and bin/wane; other configurations and --emulate write under build*/ and leave those two alone.
-- Everything version-dependent lives in this first block; below it, only fields both versions know.
local v5 = _PREMAKE_VERSION:sub(1, 1) == "5"
local function when(...) if v5 then filter { ... } else configuration { ... } end end
local function always() if v5 then filter {} else configuration {} end end
local function debugging() if v5 then symbols "On" else flags { "Symbols" } end end
local function optimised() if v5 then optimize "Speed" symbols "On" else flags { "OptimizeSpeed", "Symbols" } end end

newoption { trigger = "emulate", description = "Tests only: compile the AVX-512 and AMX kernels against portable emulation, run on any x86-64 with AVX2" }
newoption { trigger = "werror", description = "Warnings are errors (CI)" }
local emulate = _OPTIONS["emulate"] ~= nil
local build = emulate and "build-emulated" or "build"

-- Instruction-set groups: a file belongs to the group its name begins with. One static library each, because premake4 has no
-- per-file options. Plain files are portable C.
local groups = {
  { name = "avx2",       flags = { "-mavx2", "-mfma", "-mf16c", "-mbmi2" } },
  { name = "avx512",     flags = { "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi", "-mprfchw" } },
  { name = "avx512bf16", flags = { "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16", "-mprfchw" } },
  { name = "amx",        flags = { "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mprfchw" } },
}
local emulated_flags = { "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-DWANE_EMULATE", "-Wno-psabi" }

-- -ffp-contract=off: the scalar reference must round like the text says, whatever the compiler. Never -ffast-math.
local function c_project()
  buildoptions { "-std=c11", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fno-omit-frame-pointer" }
  if _OPTIONS["werror"] then buildoptions { "-Werror" } end
  defines { "_GNU_SOURCE" }
end

solution "wane"
  configurations { "release", "debug", "asan", "tsan" }
  location(build)
  language "C"
  if defaultconfiguration then defaultconfiguration "release" end
  when "release" optimised()
  when "debug" debugging()
  when "asan" debugging() buildoptions { "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined" } linkoptions { "-fsanitize=address,undefined" }
  when "tsan" debugging() buildoptions { "-O1", "-fsanitize=thread" } linkoptions { "-fsanitize=thread" }
  always()

local function output(dir)
  if emulate then
    for _, c in ipairs { "release", "debug", "asan", "tsan" } do when(c) targetdir(build .. "/" .. c .. "/" .. dir) end
  else
    when "release" targetdir(dir)
    for _, c in ipairs { "debug", "asan", "tsan" } do when(c) targetdir(build .. "/" .. c .. "/" .. dir) end
  end
  always()
end

local kernel_libraries, kernel_defines, grouped = {}, {}, {}
for _, g in ipairs(groups) do
  local found = os.matchfiles("core/**/" .. g.name .. "_*.c")
  if #found > 0 then
    project("kernels_" .. g.name)
      kind "StaticLib"
      targetname("kernels_" .. g.name)
      targetdir(build .. "/kernels")
      for _, c in ipairs { "debug", "asan", "tsan" } do when(c) targetdir(build .. "/" .. c .. "/kernels") end
      always()
      files(found)
      c_project()
      buildoptions { "-fPIC" }
      if emulate and g.name ~= "avx2" then buildoptions(emulated_flags) buildoptions { "-Wno-unused-parameter" } else buildoptions(g.flags) end
    table.insert(kernel_libraries, 1, "kernels_" .. g.name)
    if os.isfile("core/x86/" .. g.name .. "_registry.c") then table.insert(kernel_defines, "WANE_KERNELS_" .. g.name:upper()) end
    for _, f in ipairs(found) do grouped[f] = true end
  end
end

project "wane"
  kind "SharedLib"
  targetname "wane"
  output "lib"
  for _, f in ipairs(os.matchfiles "core/**.c") do if not grouped[f] then files { f } end end
  c_project()
  defines(kernel_defines)
  if emulate then defines { "WANE_EMULATE" } end
  -- nodelete: a host's dlclose must not unmap code under a worker.
  linkoptions { "-Wl,-z,nodelete", "-Wl,--exclude-libs,ALL" }
  links(kernel_libraries)
  links { "uv", "yajl", "pcre2-8", "utf8proc", "pthread", "m" }

if #os.matchfiles "repl/*.c" > 0 then
  project "repl"
    kind "ConsoleApp"
    targetname "wane"
    output "bin"
    files { "repl/*.c", "repl/*.h" }
    includedirs { "/usr/include/luajit-2.1" }
    c_project()
    -- -E: a Lua C module (luv, cjson) finds LuaJIT's symbols in this program.
    linkoptions { "-Wl,-E" }
    links { "luajit-5.1", "utf8proc", "pthread", "m", "dl" }
end
