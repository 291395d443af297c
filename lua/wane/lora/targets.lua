--- Which Linears a LoRA adapter changes when nobody says: PEFT's own defaults, by family.
-- Source: peft utils/constants.py, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.
local qv, fused = { "q_proj", "v_proj" }, { "query_key_value" }

---@type table<string, string[]> by family name (wane.models)
return {
  bloom = fused, gpt_neox = fused, falcon = fused,
  gpt2 = { "c_attn" }, t5 = { "q", "v" }, phi = { "q_proj", "v_proj", "fc1", "fc2" }, phi3 = { "qkv_proj" },
  gptj = qv, gpt_neo = qv, opt = qv, llama = qv, mistral = qv, mixtral = qv, qwen2 = qv, qwen3 = qv, qwen3_moe = qv,
  gemma2 = qv, gemma3 = qv, gemma3_text = qv,
}
