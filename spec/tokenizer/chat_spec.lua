-- ChatML against transformers' rendering; every other template is refused by name.
local support = require "support.text"
local tokenizer = require "wane.tokenizer"
local chat = require "wane.tokenizer.chat"

describe("chat templates", function()
  local cases = support.json("qwen2", "chat.json")
  it(("qwen2: texts and ids of %d conversations"):format(#cases), function()
    local tok = assert(tokenizer.load(support.fixtures .. "qwen2"))
    for _, c in ipairs(cases) do
      if not c.error then
        local o = { add_generation_prompt = c.add_generation_prompt, tokenize = false }
        assert.equal(c.rendered, tok:apply_chat_template(c.messages, o))
        o.tokenize = nil
        assert.same(c.ids, tok:apply_chat_template(c.messages, o))
      end
    end
  end)

  it("refuses templates that are not plain ChatML", function()
    for _, kind in ipairs { "llama3", "gemma" } do
      local tok = assert(tokenizer.load(support.fixtures .. kind))
      assert.is_string(tok.chat_template)
      local text, message, code = tok:apply_chat_template { { role = "user", content = "x" } }
      assert.is_nil(text)
      assert.matches("not plain ChatML", message)
      assert.equal("WANE_E_UNSUPPORTED", code)
    end
    local _, message, code = assert(tokenizer.load(support.fixtures .. "gpt2")):apply_chat_template { { role = "user", content = "x" } }
    assert.matches("no chat template", message)
    assert.equal("WANE_E_NOTFOUND", code)
  end)

  it("reads the usual spellings", function()
    local body = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}" ..
      '{% if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}'
    assert.same({}, chat.chatml(body))
    assert.same({}, chat.chatml("{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}" .. body))
    assert.same({}, chat.chatml((body:gsub("{%%", "{%%-"):gsub("message%['(%a+)'%]", "message.%1"))))
  end)

  it("is not fooled by templates that only look like it", function()
    local body = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    for _, t in ipairs {
      "", "hello", body .. "x", body .. "{{ tools }}", "{{ bos_token }}" .. body, body:gsub("content", "text"), body:gsub("'<|im_end|>' %+ ", ""),
      body:gsub("im_start|>'", "im_start|>  '"), "{% if loop.first %}" .. body .. "{% endif %}",
    } do
      assert.is_nil(chat.chatml(t))
    end
  end)

  it("names wrong messages at the caller's line", function()
    local tok = assert(tokenizer.load(support.fixtures .. "qwen2"))
    local function message_of(...) return select(2, pcall(function(...) tok:apply_chat_template(...) end, ...)) end
    assert.matches("chat_spec.lua.*a list of messages", message_of {})
    assert.matches("chat_spec.lua.*messages%[1%]", message_of { { role = "user" } })
    local text, message = tok:apply_chat_template({ { role = "user", content = "x" } }, { tools = {} })
    assert.is_nil(text)
    assert.matches("tools", message)
  end)
end)
