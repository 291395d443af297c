--- wane generate: continues a prompt.
local cli = require "wane.cli"

local parser = cli.parser("generate", "Continues a prompt, printing text as it comes.")
cli.model_options(parser)
parser:option("--prompt", "Text to continue (default: stdin).")
parser:option("--prompt-ids", "Token ids instead of text: 1,2,3."):convert(cli.ids)
parser:option("--max-new-tokens", "New tokens at most (20)."):convert(cli.count)
parser:option("--max-length", "Tokens at most, the prompt counted."):convert(cli.count)
parser:option("--min-length", "No end before this many tokens, the prompt counted."):convert(cli.count)
parser:flag("--sample", "Draw tokens instead of taking the likeliest.")
parser:flag("--greedy", "Take the likeliest token, whatever the model's generation_config says.")
parser:option("--beams", "Not part of this version yet."):convert(cli.count)
parser:option("--temperature", "With --sample: divides the scores (1.0)."):convert(cli.number)
parser:option("--top-k", "With --sample: only the k likeliest (50; 0: all)."):convert(cli.count)
parser:option("--top-p", "With --sample: the smallest set of this probability (1.0)."):convert(cli.number)
parser:option("--min-p", "With --sample: at least this share of the likeliest's probability."):convert(cli.number)
parser:option("--repetition-penalty", "Divides the scores of ids seen before (1.0)."):convert(cli.number)
parser:option("--no-repeat-ngram-size", "No run of n ids twice."):convert(cli.count)
parser:option("--seed", "Of --sample."):convert(cli.count)
parser:option("--stop", "Ends the text before this string; may be given several times."):count "*"
parser:flag("--ignore-eos", "Go on past the end of text.")

local function options(args, tok)
  if args.beams and args.beams > 1 then cli.later("--beams", "beam search") end
  if args.sample and args.greedy then cli.usage "--sample and --greedy exclude each other" end
  local sample
  if args.sample then sample = true elseif args.greedy then sample = false end
  return {
    max_new_tokens = args.max_new_tokens, max_length = args.max_length, min_length = args.min_length, do_sample = sample,
    temperature = args.temperature, top_k = args.top_k, top_p = args.top_p, min_p = args.min_p, repetition_penalty = args.repetition_penalty,
    no_repeat_ngram_size = args.no_repeat_ngram_size, seed = args.seed, stop = #args.stop > 0 and args.stop or nil,
    ignore_eos = args.ignore_eos, tokenizer = tok,
  }
end

cli.run(parser, function(args)
  options(args)                                        -- wrong usage is told before anything is read
  local prompt = args.prompt
  if args.prompt and args.prompt_ids then cli.usage "--prompt and --prompt-ids exclude each other" end
  if not args.model then cli.usage "--model is missing: a folder or a .gguf file" end
  if not args.prompt_ids and not prompt then prompt = cli.stdin "--prompt" end
  local model, tok, load_s = cli.load_model(args)
  if not tok and not args.prompt_ids then
    cli.fail("%s has no tokenizer that wane reads (%s); give --prompt-ids", args.model, tostring(model.tokenizer_error))
  end
  if not tok and #args.stop > 0 then cli.fail("--stop needs a tokenizer; %s has none that wane reads", args.model) end

  local wane = require "wane"
  local generate = require "wane.generate"
  local ids = args.prompt_ids or tok:encode(prompt, { add_special_tokens = true })
  if #ids == 0 then cli.fail "the prompt is empty" end
  local o = options(args, tok)
  local new, pieces = {}, {}
  local clock = wane.core.C.wane_clock
  local started, first = clock(), nil
  local run
  local function seen(id)
    first = first or clock()
    new[#new + 1] = id
  end
  if tok then
    local iterator
    iterator, run = generate.stream(model, tok, ids, o)
    run.on_token = seen
    for piece in iterator do
      pieces[#pieces + 1] = piece
      if not args.json then cli.out(piece) end
    end
  else
    run = generate.start(model, { ids }, o)
    for row in run.next, run do
      seen(row[1])
      if not args.json then cli.out((#new > 1 and "," or "") .. row[1]) end
    end
    run:close()
  end
  local finished = clock()
  first = first or finished
  if not args.json then cli.out "\n" end
  local prefill_s, decode_s = first - started, finished - first
  local memory = wane.memory()
  local result = {
    text = tok and table.concat(pieces) or nil, prompt_ids = ids, ids = new, finish_reason = run.finished[1] or "length", load_s = load_s,
    prefill_s = prefill_s, prefill_tokens_per_s = #ids / math.max(prefill_s, 1e-9),
    decode_tokens_per_s = #new > 1 and (#new - 1) / math.max(decode_s, 1e-9) or 0,
    peak_rss_bytes = memory.rss_peak, footprint_bytes = model:memory_footprint(), threads = wane.threads(), device = "cpu",
  }
  if args.json then
    cli.json(result)
  else
    cli.note("%d + %d tokens, load %s, prefill %.0f tokens/s, decode %.1f tokens/s, model %s, peak memory %s", #ids, #new, cli.seconds(load_s),
      result.prefill_tokens_per_s, result.decode_tokens_per_s, cli.bytes(result.footprint_bytes), cli.bytes(memory.rss_peak))
  end
end)
