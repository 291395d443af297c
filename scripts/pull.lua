--- wane pull: fetches a model from a hub into the local Hugging Face cache, where every command finds it by its name.
local cli = require "wane.cli"

local parser = cli.parser("pull", "Fetches a model into the local Hugging Face cache; broken off, it goes on where it stopped. "
  .. "HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_CACHE mean what they mean to huggingface_hub.")
parser:argument("name", "org/name, or org/name@revision (a branch, a tag or a commit; main)."):args "?"
parser:option("--model", "The same as the argument.")
parser:option("--include", "Only files that match, such as '*.gguf'; may be given several times (default: what wane reads)."):count "*"

cli.run(parser, function(args)
  local name = args.name or args.model
  if not name then cli.usage "a name is missing: org/name or org/name@revision" end
  local hub, clock = require "wane.hub", require("wane.core").C.wane_clock
  if not hub.parse(name) then cli.usage("'%s' is no model's name: expected org/name or org/name@revision", name) end
  local progress
  local started, files, bytes = clock(), 0, 0
  local path = cli.check(hub.pull(name, {
    include = #args.include > 0 and args.include or nil,
    cancelled = cli.interrupted,
    file = function(file, i, count, size)
      if progress then progress:finish() end
      progress = cli.progress(("%d/%d %s"):format(i, count, file))
      files, bytes = count, bytes + size
    end,
    progress = function(_, done, total) progress:update(done, total) end,
    retrying = function(message, attempt, attempts) cli.note("%s; trying again (%d of %d)", message, attempt + 1, attempts) end,
  }))
  if progress then progress:finish() end
  local seconds = clock() - started
  if args.json then return cli.json { name = name, path = path, files = files, bytes = bytes, seconds = seconds } end
  cli.note("%d files, %s in %s", files, cli.bytes(bytes), cli.seconds(seconds))
  cli.out(path .. "\n")
end)
