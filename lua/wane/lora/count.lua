--- Parameters as PEFT counts them, from shapes alone: wane.lora's report and wane.plan's forecast are the same numbers.
-- Source: peft peft_model.py get_nb_trainable_parameters, print_trainable_parameters. A 4-bit weight counts its packed bytes, as in the
-- figures that QLoRA's recipes print (8,650,752 of 10,597,552,128 for GPT-NeoX-20B); PEFT from 0.4 on doubles them.
-- @module wane.lora.count
local M = {}

--- Number of values of a shape.
-- @param shape integer[]
-- @return integer
function M.numel(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

--- What a weight of n values counts.
-- @param n integer
-- @param dtype string "nf4" and "fp4" are packed
-- @return integer
function M.held(n, dtype)
  return (dtype == "nf4" or dtype == "fp4") and math.ceil(n / 2) or n
end

--- Values of A and B for a module.
-- @param module wane.Linear|wane.Embedding
-- @param r integer rank
-- @return integer
function M.part(module, r)
  return r * ((module.in_features or module.count) + (module.out_features or module.width))
end

--- 8650752 as "8,650,752".
-- @param n integer
-- @return string
function M.commas(n)
  local text = ("%d"):format(n):reverse():gsub("(%d%d%d)", "%1,"):reverse()
  return (text:gsub("^,", ""))
end

--- The line that PEFT prints.
-- @param trainable integer
-- @param all integer
-- @return string
function M.line(trainable, all)
  return ("trainable params: %s || all params: %s || trainable%%: %.4f"):format(M.commas(trainable), M.commas(all), 100 * trainable / math.max(all, 1))
end

return M
