--- wane tokenize: a text's token ids, or the text of ids.
local cli = require "wane.cli"

local parser = cli.parser("tokenize", "Shows the token ids of a text, or the text of ids.")
parser:option("--model", "A folder with tokenizer.json, a tokenizer.json, or a .gguf file.")
parser:option("--text", "The text (default: stdin).")
parser:flag("--no-special", "Without the tokens that the model's template puts around a text; with --decode: leave special tokens out.")
parser:option("--decode", "Ids to decode instead: 1,2,3."):convert(cli.ids)

cli.run(parser, function(args)
  if not args.model then cli.usage "--model is missing: a folder, a tokenizer.json or a .gguf file" end
  if args.decode and args.text then cli.usage "--text and --decode exclude each other" end
  local wane = require "wane"
  local text = not args.decode and (args.text or cli.stdin "--text")
  local tok = cli.check(wane.tokenizer.load(args.model))
  if args.decode then
    text = tok:decode(args.decode, { skip_special_tokens = args.no_special == true })
    if args.json then cli.json { text = text } else cli.out(text .. "\n") end
    return
  end
  local ids, details = tok:encode(text, { add_special_tokens = not args.no_special, details = true })
  if args.json then return cli.json { ids = ids, tokens = details.tokens } end
  local rows = { { "id", "token" } }
  for i, id in ipairs(ids) do rows[#rows + 1] = { id, details.tokens[i] } end
  cli.out(cli.columns(rows) .. "\n")
end)
