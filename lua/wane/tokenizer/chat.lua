--- Chat templates. This file reads ChatML alone (SmolLM2, and files that say it plainly): the template's statements are compared
-- with the ones known here, and anything else is refused by name. A Jinja engine for the rest follows later.
-- @module wane.tokenizer.chat
local M = {}

--- The template's tags, each with its blanks squeezed and its quotes made single: "{% for message in messages %}", "{{ … }}".
-- Text outside tags may only be blank. nil when it is not.
local function statements(template)
  local list, at = {}, 1
  while true do
    local from, to, kind, body = template:find("{([{%%])%-?(.-)%-?[}%%]}", at)
    local text = template:sub(at, (from or 0) - 1)
    if text:find "%S" then return nil end
    if not from then return list end
    body = body:gsub("\n", "\\n"):gsub('"', "'"):gsub("^%s+", ""):gsub("%s+$", "")
    -- Blanks count inside quotes only.
    local quoted = {}
    body = body:gsub("'[^']*'", function(s) quoted[#quoted + 1] = s return "\1" .. #quoted .. "\1" end)
    body = body:gsub("%s*([%+%[%]%(%)=!]+)%s*", "%1"):gsub("%s+", " "):gsub("\1(%d+)\1", function(n) return quoted[tonumber(n)] end)
    list[#list + 1] = kind .. body
    at = to + 1
  end
end

local TURN = {
  "{'<|im_start|>'+message['role']+'\\n'+message['content']+'<|im_end|>'+'\\n'",
  "{'<|im_start|>'+message.role+'\\n'+message.content+'<|im_end|>'+'\\n'",
  "{'<|im_start|>'+message['role']+'\\n'+message['content']+'<|im_end|>\\n'",
}
local TURN_OF = { [TURN[1]] = true, [TURN[2]] = true, [TURN[3]] = true }
local DEFAULT_UNSET = { "%if not add_generation_prompt is defined", "%set add_generation_prompt=false", "%endif" }
local FIRST_OTHER = "%if loop.first and messages[0]['role']!='system'"
local ROLES = "%if(message.role=='user')or(message.role=='system' and not loop.first)or(message.role=='assistant')"

--- A literal that is a whole system turn: its text.
local function system_turn(statement)
  local text = statement and statement:match "^{'<|im_start|>system\\n(.*)<|im_end|>\\n'$"
  return text and (text:gsub("\\n", "\n"))
end

--- Reads a template.
-- @param template string
-- @return table|nil {default = string|nil, roles = true where only user, system and assistant speak}, or nil: not ChatML
function M.chatml(template)
  local s = statements(template)
  if not s then return nil end
  local i, r = 1, {}
  local function take(expected)
    if s[i] ~= expected then return false end
    i = i + 1
    return true
  end
  if s[1] == DEFAULT_UNSET[1] then
    for _, line in ipairs(DEFAULT_UNSET) do if not take(line) then return nil end end
  end
  if take "%if messages[0]['role']=='system'" then
    if not take "{'<|im_start|>system\\n'+messages[0]['content']+'<|im_end|>\\n'" or not take "%else" then return nil end
    r.default, r.leads = system_turn(s[i]), true
    i = i + 1
    if not r.default or not take "%endif" then return nil end
  end
  if not take "%for message in messages" then return nil end
  if not r.leads and take(FIRST_OTHER) then
    r.default = system_turn(s[i])
    i = i + 1
    if not r.default or not take "%endif" then return nil end
  end
  if r.leads then
    if not take(ROLES) then return nil end
    r.roles = true
  end
  if not TURN_OF[s[i]] then return nil end
  i = i + 1
  if r.roles and not take "%endif" then return nil end
  if not take "%endfor" then return nil end
  if take "%if add_generation_prompt" and not (take "{'<|im_start|>assistant\\n'" and take "%endif") then return nil end
  return s[i] == nil and r or nil
end

local speaks = { user = true, assistant = true, system = true }

local function turn(role, content) return "<|im_start|>" .. role .. "\n" .. content .. "<|im_end|>\n" end

--- Writes messages as ChatML.
-- @param form table from `chatml`
-- @param messages table[] {role =, content =}
-- @param generate boolean open the assistant's turn at the end
-- @return string
function M.render(form, messages, generate)
  local out = {}
  if form.default and messages[1].role ~= "system" then out[1] = turn("system", form.default) end
  for _, m in ipairs(messages) do
    if speaks[m.role] or not form.roles then out[#out + 1] = turn(m.role, m.content) end
  end
  if generate then out[#out + 1] = "<|im_start|>assistant\n" end
  return table.concat(out)
end

return M
