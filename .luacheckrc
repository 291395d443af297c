std = "luajit"
max_line_length = 160
ignore = { "581" }          -- "not (x <= y)" is written where y or x may be NaN
files["spec/**"] = { std = "+busted" }
files["premake5.lua"] = { ignore = { "1", "631" } }
exclude_files = { "build*/**", ".cache/**" }
