std = "luajit"
max_line_length = 160
files["spec/**"] = { std = "+busted" }
files["premake5.lua"] = { ignore = { "1" } }
exclude_files = { "build*/**", ".cache/**" }
