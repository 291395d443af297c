-- Training data: lines, rows of every kind, batches: shuffled, padded, packed, resumed.
local cjson = require "cjson"
local batches = require "wane.train.batches"
local core = require "wane.core"
local data = require "wane.train.data"
local golden = require "spec.support.golden"
local lines = require "wane.train.lines"
local wane = require "wane"

local paths = {}
local function file(text, name)
  local path = os.tmpname()
  os.remove(path)
  path = path .. (name or ".jsonl")
  local f = assert(io.open(path, "wb"))
  f:write(text)
  f:close()
  paths[#paths + 1] = path
  return path
end
teardown(function() for _, path in ipairs(paths) do os.remove(path) end end)

-- A tokenizer of one id a byte, with the interface that rows use.
local tok = { eos_id = { 1 }, pad_id = 0 }
function tok:encode(text, o)
  local ids = { text:byte(1, -1) }
  if self.bos and o.add_special_tokens then table.insert(ids, 1, 2) end
  return ids
end
function tok.apply_chat_template(_, messages, o)
  local out = {}
  for _, m in ipairs(messages) do out[#out + 1] = ("<%s>%s</>\n"):format(m.role, m.content) end
  return table.concat(out) .. (o.add_generation_prompt and "<assistant>" or "")
end
local function bytes(text) return { text:byte(1, -1) } end

describe("lines of a file", function()
  it("are found by number: CRLF, no newline at the end, empty ones, a byte order mark, NUL bytes", function()
    local l = assert(lines.open(file "\239\187\191one\r\r\ntwo\n\nfo\0ur\nlast"))
    assert.equal(5, l.count)
    assert.same({ "one\r", "two", "", "fo\0ur", "last" }, { l:get(1), l:get(2), l:get(3), l:get(4), l:get(5) })
    assert.matches("is empty", select(2, lines.open(file "")))
    assert.equal(1, assert(lines.open(file "\n")).count)
    local long = ("x"):rep(3 * 2 ^ 20)                                    -- longer than what is read at a time
    l = assert(lines.open(file(long .. "\nshort\n" .. long)))
    assert.equal(3, l.count)
    assert.equal(long, (l:get(1)))
    assert.equal("short", (l:get(2)))
    assert.equal(long, (l:get(3)))
  end)

  it("that are blank are told: empty or white space, however many, at both ends, behind a byte order mark, beside long lines", function()
    local function blank(text)
      local l, full, list = assert(lines.open(file(text))), {}, {}
      for i = 1, l.count - l.blanks do full[l:full(i)] = true end
      for i = 1, l.count do if not full[i] then list[#list + 1] = i end end
      assert.equal(l.blanks, #list)
      return list
    end
    assert.same({}, blank "one\ntwo")
    assert.same({ 2, 4, 5 }, blank "one\n\n two\n \t\r\n\r\n\vx\n")
    assert.same({ 1, 3 }, blank "\239\187\191 \none\n  ")
    assert.same({}, blank "\239\187\191a\n")
    assert.same({ 1 }, blank "\n")
    local long = (" "):rep(3 * 2 ^ 20)                                    -- longer than what is read at a time
    assert.same({ 1, 3 }, blank(long .. "\n" .. long .. "x\n" .. long))
    assert.same({ 2 }, blank("x" .. long .. "\n" .. long))
    assert.same({ 2 }, blank(("x"):rep(2 ^ 20 - 1) .. "\n\ny\n"))        -- a line that ends with what is read at a time
    assert.same({ 2 }, blank(("x"):rep(2 ^ 20 - 3) .. "\n  \n y\n"))
    local many = blank(("\n"):rep(2 ^ 20 + 10) .. "x\n\n")
    assert.equal(2 ^ 20 + 11, #many)
    assert.equal(2 ^ 20 + 12, many[#many])
  end)

  it("have the checksum of their file, but for a byte order mark", function()
    for _, n in ipairs { 1, 31, 32, 33, 2 ^ 20 - 1, 2 ^ 20, 2 ^ 20 + 40, 2 ^ 21 } do
      local text = ("a line\n\n"):rep(math.ceil(n / 8)):sub(1, n)
      local hash = require("wane.checkpoint.paths").hash_text(text)
      assert.equal(hash, assert(lines.open(file(text))).hash)
      assert.equal(hash, assert(lines.open(file("\239\187\191" .. text))).hash)
    end
  end)

  it("of a missing or shortened file are an error", function()
    local l, message = lines.open "/nowhere/rows.jsonl"
    assert.is_nil(l)
    assert.matches("/nowhere/rows.jsonl", message)
    local path = file "first line\nsecond line\n"
    l = assert(lines.open(path))
    io.open(path, "w"):close()
    l, message = l:get(2)
    assert.is_nil(l)
    assert.matches("truncated", message)
  end)

  it("of a large file do not enter memory #large", function()
    if os.getenv "WANE_LARGE" ~= "1" or os.getenv "WANE_SANITIZER" then return pending "WANE_LARGE=1 runs it" end
    local path = os.tmpname()
    paths[#paths + 1] = path
    assert(os.execute(([[luajit -e 'local s=(("word "):rep(200).."\n"):rep(1000) for i=1,300 do io.write(s) end' >%s]]):format(path)) == 0)   -- 300 MB
    local before = wane.memory().rss
    local l = assert(lines.open(path))
    assert.equal(300000, l.count)
    for i = 1, l.count, 1000 do assert.equal(1000, #l:get(i)) end
    assert.is_true(wane.memory().rss - before < 24e6)
  end)
end)

describe("rows", function()
  it("of JSONL text: a sample, its end behind, the tokenizer's beginning in front", function()
    local path = file '{"text":"ab"}\n{"text":"c"}\n'
    local rows = assert(data.open(path, tok))
    assert.equal(2, rows.count)
    assert.equal("jsonl", rows.kind)
    assert.same({ ids = { 97, 98, 1 }, labels = { 97, 98, 1 }, line = 1 }, rows:get(1))
    tok.bos = true
    assert.same({ 2, 99, 1 }, assert(data.open(path, tok)):get(2).ids)
    tok.bos = nil
    rows = assert(data.open(file '{"quote":"abc"}\n', tok, { text_field = "quote", max_length = 2 }))
    assert.same({ 97, 98 }, rows:get(1).ids)
    assert.equal(1, rows.truncated)
  end)

  it("of messages: the answers alone are scored", function()
    local rows = assert(data.open(file(cjson.encode { messages = { { role = "user", content = "hi" }, { role = "assistant", content = "yo" },
      { role = "user", content = "?" }, { role = "assistant", content = "!" } } } .. "\n"), tok))
    local row = rows:get(1)
    local text, scored = {}, {}
    for i, id in ipairs(row.ids) do
      text[i] = string.char(id)
      scored[i] = row.labels[i] ~= -100 and string.char(row.labels[i]) or "."
    end
    assert.equal("<user>hi</>\n<assistant>yo</>\n<user>?</>\n<assistant>!</>\n", table.concat(text))
    assert.equal(#"<user>hi</>\n<assistant>", table.concat(scored):find "[^.]" - 1)
    assert.equal("yo</>!</>", (table.concat(scored):gsub("%.", "")))
  end)

  it("of a real tokenizer's ChatML train the answer and its end", function()
    if not io.open ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf" then return pending "no demonstration model" end
    local real = assert(wane.tokenizer.load ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    local messages = { { role = "user", content = "Say hello." }, { role = "assistant", content = "Hello!" } }
    local row = assert(data.open(file(cjson.encode { messages = messages } .. "\n"), real)):get(1)
    local learned = {}
    for _, id in ipairs(row.labels) do if id ~= -100 then learned[#learned + 1] = id end end
    assert.equal("Hello!<|im_end|>", real:decode(learned, { skip_special_tokens = false }))
  end)

  it("of pairs: the target alone is scored; an encoder-decoder reads the input", function()
    local path = file '{"input":"ab","target":"cd"}\n{"prompt":"x","completion":"y"}\n'
    local rows = assert(data.open(path, tok))
    assert.same({ ids = { 97, 98, 99, 100, 1 }, labels = { -100, -100, 99, 100, 1 }, line = 1 }, rows:get(1))
    assert.same({ -100, 121, 1 }, rows:get(2).labels)
    rows = assert(data.open(path, tok, { encoder_decoder = true }))
    assert.same({ ids = { 97, 98, 1 }, labels = { 99, 100, 1 }, line = 1 }, rows:get(1))
  end)

  it("of ids: those of the vocabulary, and labels of them or -100; others are bad rows", function()
    local good = '{"input_ids":[0,255,3],"labels":[-100,255,0]}\n'
    for line, reason in pairs {
      ['{"input_ids":[1,256]}'] = "entry 2 of 'input_ids' is 256: expected an id of the vocabulary, 0 to 255",
      ['{"input_ids":[1,-1]}'] = "entry 2 of 'input_ids' is -1: expected an id of the vocabulary, 0 to 255",
      ['{"input_ids":[-100,2]}'] = "entry 1 of 'input_ids' is -100: expected an id of the vocabulary, 0 to 255",
      ['{"input_ids":[1,2,3],"labels":[1,2,-5]}'] = "entry 3 of 'labels' is -5: expected an id of the vocabulary, 0 to 255, or -100",
      ['{"input_ids":[1,2,3],"labels":[1,999,3]}'] = "entry 2 of 'labels' is 999: expected an id of the vocabulary, 0 to 255, or -100",
      ['{"input_ids":[1,1.5]}'] = "entry 2 of 'input_ids' is no id", ['{"input_ids":[1,null]}'] = "entry 2 of 'input_ids' is no id",
    } do
      local path = file(good .. line .. "\n")
      local rows = assert(data.open(path, nil, { vocabulary = 256 }))
      assert.same({ -100, 255, 0 }, rows:get(1).labels)
      local ok, message = pcall(rows.get, rows, 2)
      assert.is_false(ok)
      assert.is_truthy(tostring(message):find(path .. ", line 2: " .. reason, 1, true), tostring(message))
      rows = assert(data.open(path, nil, { vocabulary = 256, bad_rows = "skip" }))
      assert.is_nil(rows:get(2))
      assert.same({ { line = 2, reason = reason } }, rows.skipped)
    end
    -- Without a vocabulary any id from 0 on is taken; with a tokenizer its own; `vocabulary` goes before it.
    local path = file '{"input_ids":[1,999]}\n{"input_ids":[1,-1]}\n{"input_ids":[1,4294967296]}\n'
    local rows = assert(data.open(path, nil))
    assert.same({ 1, 999 }, rows:get(1).ids)
    assert.error_matches(function() rows:get(2) end, "line 2: entry 2 of 'input_ids' is %-1: expected an id from 0 on %(")
    assert.error_matches(function() rows:get(3) end, "line 3: entry 2 of 'input_ids' is 4294967296")
    local sized = setmetatable({ vocab_size = 999 }, { __index = tok })
    assert.error_matches(function() assert(data.open(path, sized)):get(1) end, "is 999: expected an id of the vocabulary, 0 to 998")
    assert.same({ 1, 999 }, assert(data.open(path, sized, { vocabulary = 1000 })):get(1).ids)
    assert.error_matches(function() data.open(path, nil, { vocabulary = 0 }) end, "vocabulary: expected how many ids there are, .* found 0")
  end)

  it("of ids leave out padding, as their mask tells it, on either side", function()
    local function row(line, o) return assert(data.open(file(line .. "\n"), nil, o)):get(1) end
    for line, want in pairs {
      ['{"input_ids":[5,6,7,0,0],"attention_mask":[1,1,1,0,0]}'] = { { 5, 6, 7 }, { 5, 6, 7 } },
      ['{"input_ids":[0,5,6],"attention_mask":[0,1,1]}'] = { { 5, 6 }, { 5, 6 } },
      ['{"input_ids":[5,6,7,0],"attention_mask":[1,1,1,0],"labels":[-100,6,7,0]}'] = { { 5, 6, 7 }, { -100, 6, 7 } },
      ['{"input_ids":[5,6],"attention_mask":[1,1],"labels":null}'] = { { 5, 6 }, { 5, 6 } },
      ['{"input_ids":[5,6],"attention_mask":null}'] = { { 5, 6 }, { 5, 6 } },
    } do
      assert.same(want, { row(line).ids, row(line).labels }, line)
    end
    local pair = row('{"input_ids":[5,6,0],"attention_mask":[1,1,0],"labels":[8,9,3,2]}', { encoder_decoder = true })
    assert.same({ { 5, 6 }, { 8, 9, 3, 2 } }, { pair.ids, pair.labels })
    for line, reason in pairs {
      ['{"input_ids":[5,6,7],"attention_mask":[1,1]}'] = "'attention_mask' is no list as long as 'input_ids'",
      ['{"input_ids":[5,6],"attention_mask":[1,true]}'] = "entry 2 of 'attention_mask' is neither 0 nor 1",
      ['{"input_ids":[5,6,7],"attention_mask":[1,0,1]}'] = "has a 0 between its ones", ['{"input_ids":[5,6],"attention_mask":[0,0]}'] = "nothing to learn",
      ['{"input_ids":7,"attention_mask":[0,0]}'] = "no list as long",
      ['{"input_ids":[5,6,7,8],"attention_mask":[1,1,1,1],"labels":[5,6,7,8,9,10]}'] = "4 ids and 6 labels",
      ['{"input_ids":[5,6,7,8],"attention_mask":[0,0,1,1],"labels":[7,8]}'] = "4 ids and 2 labels",
      ['{"input_ids":[5,6],"attention_mask":[1,1],"labels":7}'] = "'labels' is no list of ids",
    } do
      assert.error_matches(function() row(line) end, "line 1: .*" .. reason)
    end
  end)

  it("have no field that is null", function()
    local rows = assert(data.open(file '{"messages":null,"input_ids":null,"text":"ab"}\n{"text":null}\n', tok))
    assert.equal("jsonl", rows.kind)
    assert.same({ 97, 98, 1 }, rows:get(1).ids)
    assert.error_matches(function() rows:get(2) end, "line 2: no text in 'text'; its fields are none")
    rows = assert(data.open(file '{"input":null,"target":null,"prompt":"a","completion":"b","text":"c"}\n', tok))
    assert.same({ "pairs", { 97, 98, 1 } }, { rows.kind, rows:get(1).ids })
  end)

  it("that are no UTF-8 are bad rows, told by the byte", function()
    local function reason(text)
      local rows = assert(data.open(file('{"text":"good"}\n{"text":"' .. text .. '"}\n'), tok, { bad_rows = "skip" }))
      return not rows:get(2) and rows.skipped[1].reason or nil
    end
    for _, text in ipairs { "a\194\128\223\191", "\224\160\128\237\159\191\238\128\128\239\191\191", "\240\144\128\128\244\143\191\191", "häß €" } do
      assert.is_nil(reason(text), text)
    end
    for text, at in pairs { ["\255"] = 10, ["ab\233t"] = 12, ["ä\192\128"] = 12, ["\224\159\191"] = 10, ["\237\160\128"] = 10, ["\240\143\191\191"] = 10,
      ["\244\144\128\128"] = 10, ["\245\128\128\128"] = 10, ["é\195"] = 12, ["\226\130"] = 10, ["\195\195\169"] = 10, ["\195\169\169"] = 12 } do
      assert.equal(("byte %d is no UTF-8"):format(at), reason(text))
    end
  end)

  it("are the lines that are not blank, which messages count all the same", function()
    local path = file '\n{"text":"a"}\n\n \t\r\n{"text":"b"}\n{"text":""}\n\n{"text":"c"}\n  \n\n'
    local rows = assert(data.open(path, tok, { bad_rows = "skip" }))
    assert.equal(4, rows.count)
    assert.same({ { 97, 1 }, 2, { 98, 1 }, 5, { 99, 1 }, 8 },
      { rows:get(1).ids, rows:get(1).line, rows:get(2).ids, rows:get(2).line, rows:get(4).ids, rows:get(4).line })
    assert.is_nil(rows:get(3))
    assert.equal(1, rows.bad)
    assert.same({ { line = 6, reason = "an empty text" } }, rows.skipped)
    rows = assert(data.open(path, tok))
    assert.error_matches(function() rows:get(3) end, "line 6: an empty text")
    assert.equal(2, assert(data.open(file(("\n"):rep(500) .. '{"text":"a"}\n{"text":"b"}\n'), tok)).count)
  end)

  it("that are cut are counted once, however often they are read", function()
    local rows = assert(data.open(file '{"text":"abcd"}\n{"text":"a"}\n{"text":"efgh"}\n', tok, { max_length = 3 }))
    for _ = 1, 3 do for i = 1, 3 do rows:get(i) end end
    assert.equal(2, rows.truncated)
  end)

  it("of a plain text: blocks of max_length ids", function()
    assert.equal("text", assert(data.open(file("\n\nabc\n", ".txt"), tok)).kind)
    local rows = assert(data.open(file("abcde\nfgh\n", ".txt"), tok, { max_length = 4 }))
    assert.equal("text", rows.kind)
    assert.equal(3, rows.count)
    assert.same(bytes "abcd", rows:get(1).ids)
    assert.same(bytes "h\n", rows:get(3).ids)
    assert.equal(2, assert(data.open(file("abcde\nfg\n", ".txt"), tok, { max_length = 4 })).count)      -- a last id has nothing to predict
  end)

  it("are of the text field that was asked for, whatever else is in them", function()
    local path = file '{"body":"ab","text":"x","input":"c","target":"d","messages":[{"role":"user","content":"e"}]}\n'
    local rows = assert(data.open(path, tok, { text_field = "body" }))
    assert.same({ "jsonl", { 97, 98, 1 } }, { rows.kind, rows:get(1).ids })
    assert.equal("messages", assert(data.open(path, tok)).kind)
    assert.matches("line 1: no text in 'messages'", (select(2, data.open(path, tok, { text_field = "messages" }))))
  end)

  it("that were exported come back as they were", function()
    local rows = assert(data.open(file '{"input":"ab","target":"cd"}\n{"input":"e","target":"f"}\n', tok))
    local path = file ""
    assert.equal(2, data.export(rows, path, { 2, 1 }))
    local again = assert(data.open(path, nil))
    assert.equal("ids", again.kind)
    assert.same(rows:get(2).labels, again:get(1).labels)
    assert.same(rows:get(1).ids, again:get(2).ids)
  end)

  local bad = { ["the conversation begins"] = '{"messages":[{"role":"assistant","content":"a"}]}', ["no JSON"] = "{",
    ["no JSON object: Expected value but found invalid unicode escape code at character 10"] = [[{"text":"\ud800"}]],
    ["no JSON object, but a number"] = "7",
    ["no text in 'text'; its fields are 'by', 'txt'"] = '{"txt":"a","by":"b"}', ["no text in 'text'"] = '{"text":3}', ["an empty text"] = '{"text":""}' }
  for reason, line in pairs(bad) do
    it("that cannot be used are named by their line, or left out: " .. reason, function()
      local good = line:find "messages" and '{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}' or '{"text":"good"}'
      local path = file(good .. "\n" .. line .. "\n" .. good .. "\n")
      local rows = assert(data.open(path, tok))
      assert.is_truthy(rows:get(1))
      assert.error_matches(function() rows:get(2) end, "line 2: " .. reason)
      assert.error_matches(function() rows:get(2) end, '%(bad_rows = "skip", or %-%-bad%-rows skip on the command line, leaves such rows out%)')
      rows = assert(data.open(path, tok, { bad_rows = "skip" }))
      assert.is_nil(rows:get(2))
      assert.is_nil(rows:get(2))
      assert.equal(1, rows.bad)
      assert.equal(2, rows.skipped[1].line)
    end)
  end

  it("with nothing to learn are bad rows", function()
    local rows = assert(data.open(file '{"input":"abcdef","target":"g"}\n', tok, { max_length = 4 }))
    assert.error_matches(function() rows:get(1) end, "nothing to learn before it is cut")
  end)

  it("need a file that holds some, and a tokenizer", function()
    for text, pattern in pairs { [""] = "is empty", ['{"a":1}\n'] = "none of the fields", ["\n \t\n"] = "all its lines are blank",
      ["[1,2\n"] = "no JSON object" } do
      local rows, message = data.open(file(text), tok)
      assert.is_nil(rows)
      assert.matches(pattern, message)
    end
    local _, empty = data.open(file "", tok)
    assert.matches("no training data: the file is empty: expected JSONL", empty)
    assert.not_matches("download", empty)
    _, empty = data.open("/dev/null", tok)                                -- is not read to see what it holds
    assert.matches("no regular file", empty)
    local rows, message = data.open(file '{"text":"a"}\n', nil)
    assert.is_nil(rows)
    assert.matches("no tokenizer", message)
    assert.error_matches(function() data.open(file '{"text":"a"}\n', tok, { bad_rows = "maybe" }) end, "expected 'fail' or 'skip'")
    assert.error_matches(function() data.open(file '{"text":"a"}\n', tok, { max_length = 0 }) end, "expected a whole number above 1, found 0")
    rows = assert(data.open(file '{"input_ids":[1,2]}\n{"input_ids":["1"]}\n', nil))
    assert.error_matches(function() rows:get(2) end, "line 2: entry 1 of 'input_ids' is no id")
  end)
end)

describe("training data is refused:", function()
  it("a binary file, told by a NUL byte near its beginning", function()
    for _, name in ipairs { ".txt", ".jsonl", ".gguf" } do
      local rows, message = data.open(file("GGUF\3\0\0\0text\n", name), tok)
      assert.is_nil(rows)
      assert.matches("no training data: a binary file %(byte 6 is NUL%): expected JSONL, a row a line, or a plain text, in UTF%-8", message)
    end
    assert.matches("byte 65536 is NUL", (select(2, data.open(file(("x"):rep(65535) .. "\0", ".txt"), tok))))
    assert.is_truthy(data.open(file(("x\n"):rep(32768) .. "\0", ".txt"), tok))
  end)

  it("fields that no kind has: of the first row, with what it has", function()
    local _, message = data.open(file '\n{"quote":"a","author":"b"}\n{"txt":"a"}\n{\n', tok)
    assert.matches("no training data: line 2: none of the fields 'text', 'messages', 'input' and 'target', 'input_ids'; "
      .. "its fields are 'author', 'quote' %(", message)
    assert.matches("text_field, or %-%-text%-field on the command line, names", message)
    _, message = data.open(file '{"text":"a"}\n', tok, { text_field = "quote" })
    assert.matches("line 1: no text in 'quote'; its fields are 'text' ", message)
    _, message = data.open(file "{}\n", tok)
    assert.matches("its fields are none", message)
    _, message = data.open(file '{"text":"\\udfff"}\n', tok)
    assert.matches("line 1: no JSON object: .*invalid unicode escape code at character 10", message)
  end)

  it("options that there are not", function()
    assert.error_matches(function() data.open(file '{"text":"a"}\n', tok, { textfield = "a" }) end, "data.open: there is no option 'textfield'")
    local rows = assert(data.open(file '{"text":"a"}\n', tok))
    assert.error_matches(function() batches.new(rows, { batchsize = 4 }) end, "batches.new: there is no option 'batchsize'")
  end)
end)

describe("batches", function()
  local function rows_of(n, longest, max_length)
    local out = {}
    for i = 1, n do out[i] = cjson.encode { text = string.char(64 + i % 50):rep(1 + i * 7 % longest) } end
    return assert(data.open(file(table.concat(out, "\n")), tok, { max_length = max_length }))
  end

  it("are shuffled by a permutation, another for every epoch and seed", function()
    for _, n in ipairs { 1, 2, 3, 10, 1000, 65537 } do
      local p, seen, moved = batches.permutation(n, 7), {}, 0
      for i = 0, n - 1 do
        local v = p(i)
        assert.is_true(v >= 0 and v < n and not seen[v])
        seen[v] = true
        if v ~= i then moved = moved + 1 end
      end
      assert.is_true(n < 10 or moved > n / 2)
    end
    local a, b = batches.permutation(1000, 1), batches.permutation(1000, 2)
    local equal = 0
    for i = 0, 999 do if a(i) == b(i) then equal = equal + 1 end end
    assert.is_true(equal < 20)
  end)

  it("hold every row once an epoch, padded on the right, with labels that count", function()
    local rows = rows_of(10, 5)
    local feed = batches.new(rows, { batch_size = 3, accumulate = 2, seed = 1, pad = 0 })
    local seen, sizes = {}, {}
    for update in feed.rest, feed do
      sizes[#sizes + 1] = #update
      local count = 0
      for _, batch in ipairs(update) do
        for b, line in ipairs(batch.rows) do
          assert.is_nil(seen[line])
          seen[line] = true
          local row = rows:get(line)
          for t = 1, #batch.ids[b] do
            assert.equal(row.ids[t] or 0, batch.ids[b][t])
            assert.equal(row.labels[t] or -100, batch.labels[b][t])
            assert.equal(row.ids[t] and 1 or 0, batch.attention_mask and batch.attention_mask[b][t] or 1)
          end
          count = count + #row.ids - 1
        end
      end
      assert.equal(count, update.count)
    end
    assert.equal(10, #seen)
    assert.same({ 2, 2 }, sizes)
    assert.equal(1, feed:next().epoch)
  end)

  it("come in another order in every epoch", function()
    local feed = batches.new(rows_of(40, 5), { batch_size = 40, seed = 1 })
    local first, second = feed:next()[1].rows, feed:next()[1].rows
    assert.not_same(first, second)
    table.sort(first)
    table.sort(second)
    assert.same(first, second)
  end)

  it("of similar length lie together in every stretch of fifty, each row once", function()
    local rows, seen, longest = rows_of(230, 40), {}, {}
    local feed = batches.new(rows, { batch_size = 2, group_by_length = true, seed = 3 })
    for update in feed.rest, feed do
      for _, line in ipairs(update[1].rows) do
        seen[#seen + 1] = line
        longest[#seen] = #rows:get(line).ids
      end
    end
    table.sort(seen)
    for i = 1, 230 do assert.equal(i, seen[i]) end
    for i = 2, 230 do
      if i % 100 == 1 then assert.is_true(longest[i] > longest[i - 1], i)   -- a stretch begins with its longest
      else assert.is_true(longest[i] <= longest[i - 1], i) end
    end
  end)

  it("of similar length lie together", function()
    local feed = batches.new(rows_of(60, 40), { batch_size = 4, group_by_length = true, seed = 3 })
    local last = math.huge
    for update in feed.rest, feed do
      for _, line in ipairs(update[1].rows) do
        local n = #feed.rows:get(line).ids
        assert.is_true(n <= last)
        last = n
      end
    end
  end)

  it("are packed: samples apart, nothing lost, no row longer than max_length", function()
    local rows = rows_of(23, 9, 16)
    local feed = batches.new(rows, { batch_size = 2, packing = true, seed = 5 })
    local seen = {}
    for update in feed.rest, feed do
      local batch = update[1]
      for b, ids in ipairs(batch.ids) do
        assert.is_true(#ids <= 16)
        for t = 1, #ids do
          local first, position = batch.first[b][t], batch.positions[b][t]
          assert.equal(t - 1 - first, position)
          if position == 0 then assert.equal(-100, batch.labels[b][t]) end
          if t > 1 then assert.is_true(first >= batch.first[b][t - 1]) end
        end
      end
      for _, line in ipairs(batch.rows) do seen[#seen + 1] = line end
    end
    table.sort(seen)
    assert.equal(23, #seen)
    for i, line in ipairs(seen) do assert.equal(i, line) end
  end)

  for _, o in ipairs { {}, { packing = true }, { group_by_length = true }, { shuffle = false } } do
    it("go on anywhere as if they had not stopped: " .. (next(o) or "plain"), function()
      local rows = rows_of(37, 9, 20)
      local function new()
        local options = { batch_size = 3, accumulate = 2, seed = 11 }
        for key, value in pairs(o) do options[key] = value end
        return batches.new(rows, options)
      end
      local feed, states, updates = new(), {}, {}
      for i = 1, 25 do
        states[i] = cjson.decode(cjson.encode(feed:state()))
        updates[i] = feed:next()
      end
      for _, i in ipairs { 1, 2, 7, 12, 20 } do
        local again = new():restore(states[i])
        for k = i, 25 do assert.same(updates[k], again:next()) end
      end
    end)
  end

  it("of packed rows go on anywhere in a file with blank lines", function()
    local text = {}
    for i = 1, 20 do text[i] = ("\n"):rep(i % 3) .. cjson.encode { text = string.char(64 + i):rep(1 + i * 7 % 9) } .. "\n" end
    local rows = assert(data.open(file(table.concat(text)), tok, { max_length = 16 }))
    assert.equal(20, rows.count)
    local function new() return batches.new(rows, { batch_size = 1, packing = true, seed = 2 }) end
    local feed, states, updates, left = new(), {}, {}, 0
    for i = 1, 12 do
      states[i] = cjson.decode(cjson.encode(feed:state()))
      left = left + (states[i].left and 1 or 0)
      updates[i] = feed:next()
    end
    assert.is_true(left > 5)
    for i = 1, 12 do assert.same(updates[i], new():restore(states[i]):next()) end
  end)

  it("end with their epoch where the last rows are left out", function()
    local rows = assert(data.open(file '{"text":"aa"}\n{"text":"bb"}\n{}\n', tok, { bad_rows = "skip" }))
    local n, feed = 0, batches.new(rows, { batch_size = 1, shuffle = false })
    for _ in feed.rest, feed do n = n + 1 end
    assert.equal(2, n)
    feed = batches.new(rows_of(3, 40, 8), { batch_size = 1, packing = true })
    for update in feed.rest, feed do assert.is_true(#update[1].ids[1] <= 8) end
  end)

  it("tell what cannot be", function()
    local rows = assert(data.open(file '{"text":""}\n{"text":""}\n', tok, { bad_rows = "skip" }))
    assert.error_matches(function() batches.new(rows):next() end, "no row of .* can be used: line %d: an empty text")
    assert.error_matches(function() batches.new(rows, { packing = true, group_by_length = true }) end, "exclude each other")
  end)

  it("packed give the loss and the gradients of their samples alone", function()
    local model = assert(wane.load(golden.root .. "llama", { tokenizer = false, compute = "f32" }))
    model:train_parameters "q_proj"
    local samples = { { 5, 9, 30, 2, 7 }, { 11, 3, 8 }, { 40, 41, 42, 43 } }
    local lines_ = {}
    for i, ids in ipairs(samples) do lines_[i] = cjson.encode { input_ids = ids } end
    local rows = assert(data.open(file(table.concat(lines_, "\n")), nil, { max_length = 16 }))
    local function gradients(update)
      local total = 0
      core.scope(function()
        for _, b in ipairs(update) do
          local loss = model:loss(b.ids, b.labels, { count = update.count, attention_mask = b.attention_mask, positions = b.positions, first = b.first })
          loss:backward()
          total = total + loss:item()
        end
      end)
      local out = { total }
      for i, p in ipairs(model:trainable_parameters()) do
        out[i + 1] = p.grad
        p.grad = nil
      end
      return out
    end
    local packed = gradients(batches.new(rows, { batch_size = 1, packing = true, shuffle = false }):next())
    local alone = gradients(batches.new(rows, { batch_size = 1, accumulate = 3, shuffle = false }):next())
    assert.is_true(math.abs(packed[1] - alone[1]) < 1e-5)
    local worst = 0
    for i = 2, #packed do worst = math.max(worst, (packed[i] - alone[i]):abs():max():item() / alone[i]:abs():max():item()) end
    print(("  packed against alone: gradients differ by %.2g of the largest"):format(worst))
    assert.is_true(worst < 1e-5)
    model:close()
  end)
end)
