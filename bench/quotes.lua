--- Quotations as training data: Debian's `fortunes`, one JSONL row a quotation, every tenth held out.
--
--     luajit bench/quotes.lua OUT.jsonl HELD_OUT.jsonl [FILE ...]          (default: literature, wisdom, work … of /usr/share/games/fortunes)
local cjson = require "cjson"

local out, held_out = arg[1], arg[2]
assert(held_out, "usage: luajit bench/quotes.lua OUT.jsonl HELD_OUT.jsonl [FILE ...]")
local files = { unpack(arg, 3) }
if #files == 0 then
  for _, name in ipairs { "literature", "wisdom", "work", "people", "love", "science", "men-women", "education", "politics" } do
    files[#files + 1] = "/usr/share/games/fortunes/" .. name
  end
end

local train, test, n, bytes = assert(io.open(out, "w")), assert(io.open(held_out, "w")), 0, 0
for _, path in ipairs(files) do
  local f = assert(io.open(path))
  for quote in (f:read "*a" .. "\n%\n"):gmatch "(.-)\n%%\n" do
    quote = quote:gsub("[%s]+", " "):gsub("^ ", ""):gsub(" $", "")
    if #quote > 20 and #quote < 600 and not quote:find "[\128-\255]" then
      n = n + 1
      bytes = bytes + #quote
      local file = n % 10 == 0 and test or train
      file:write(cjson.encode { quote = quote }, "\n")
    end
  end
  f:close()
end
train:close()
test:close()
print(("%d quotations, %d bytes"):format(n, bytes))
