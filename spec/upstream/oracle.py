"""What transformers, bitsandbytes and peft make of folders: the other side of roundtrip_spec.lua and adapters_spec.lua.

    python oracle.py JOBS.json          # results: JOBS.json with ".out" behind it

A job is {"op": "load", "folder", "ids", "decoder_ids"?} or, with the same and more, {"op": "save", "source", "quant": {...}, "dtype"} or
{"op": "adapter", "base"}. Logits are written
as raw float32 beside the folder's weights (logits.f32: products with the exactly dequantized weights; raw.f32: with upstream's own modules).

bitsandbytes' CPU kernels are no oracle: they repack weights lossily on AVX512-BF16 machines (switched off here), take wrong scales when
a row is no multiple of the block on AVX-512, and round int8 activations. So the weights that upstream loaded are dequantized here, by the
format alone, and put into plain Linears.
"""

import json
import logging
import os
import sys
import traceback
import warnings

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch

torch.set_num_threads(1)
import bitsandbytes as bnb
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
bnb.nn.modules.has_avx512bf16 = lambda: False


def dequantize_4bit(weight):
    """float32 values of a Params4bit: high nibble first, blocks over the flat weight"""
    state = weight.quant_state
    packed = weight.data.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1).long()
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        absmax = inner.code.float()[absmax.long()] * inner.absmax.float().repeat_interleave(inner.blocksize)[: absmax.numel()] + state.offset
    n = state.shape.numel()
    scale = absmax.float().repeat_interleave(state.blocksize)[:n]
    return (state.code.float()[codes[:n]] * scale).reshape(state.shape)


def plain(module):
    """a torch Linear in the place of a quantized one"""
    if isinstance(module, bnb.nn.Linear4bit):
        w = dequantize_4bit(module.weight)
    else:
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB  # where they are after a forward pass
        w = module.weight.data.double() * (scales.double() / 127.0)[:, None]
    new = torch.nn.Linear(w.shape[1], w.shape[0], bias=module.bias is not None)
    with torch.no_grad():
        new.weight.copy_(w)
        if module.bias is not None:
            new.bias.copy_(module.bias)
    return new


def quantized_modules(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]


def auto_class(folder):
    return AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM


def logits_of(model, job, path):
    inputs = {"input_ids": torch.tensor(job["ids"])}
    if "decoder_ids" in job:
        inputs["decoder_input_ids"] = torch.tensor(job["decoder_ids"])
    with torch.no_grad():
        out = model(**inputs).logits.float()
    out.numpy().tofile(path)
    return out


def examine(model, folder, job):
    """logits with upstream's modules and with plain ones"""
    result = {"quantized": sorted(n for n, _ in quantized_modules(model))}
    raw = None
    try:
        raw = logits_of(model, job, f"{folder}/raw.f32")
    except Exception as e:  # its CPU kernels refuse some shapes
        result["raw_error"] = f"{type(e).__name__}: {e}"
    for name, module in quantized_modules(model):
        model.set_submodule(name, plain(module))
    exact = logits_of(torch.nn.Module.float(model), job, f"{folder}/logits.f32")  # transformers' own refuses
    result["shape"] = list(exact.shape)
    result["absmax"] = float(exact.abs().max())
    if raw is not None:
        result["raw_difference"] = float((raw - exact).abs().max())
    return result


def load(job):
    folder = job["folder"]
    model, info = auto_class(folder).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    missing = [str(k) for k in info["missing_keys"]]
    unexpected = [str(k) for k in info["unexpected_keys"]]
    return {**examine(model.eval(), folder, job), "missing": missing, "unexpected": unexpected}


def save(job):
    quant = dict(job["quant"])
    if "bnb_4bit_compute_dtype" in quant:
        quant["bnb_4bit_compute_dtype"] = getattr(torch, quant["bnb_4bit_compute_dtype"])
    model = auto_class(job["source"]).from_pretrained(
        job["source"], dtype=getattr(torch, job["dtype"]), attn_implementation="eager", quantization_config=BitsAndBytesConfig(**quant))
    model.save_pretrained(job["folder"])
    return load(job)  # in float32: buffers of a 16-bit model (Gemma's scale of the embedding) are rounded


def adapter(job):
    """logits of a base with the adapter in the folder; what peft says of keys that it lacks or does not know"""
    from peft import PeftModel

    base = auto_class(job["base"]).from_pretrained(job["base"], dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, job["folder"])
        complaints = [str(w.message) for w in told if "keys" in str(w.message)]
        out = logits_of(model.eval(), job, job["folder"] + "/logits.f32")
    trainable = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n)
    return {"shape": list(out.shape), "absmax": float(out.abs().max()), "complaints": complaints, "parameters": trainable}


def main():
    with open(sys.argv[1]) as f:
        jobs = json.load(f)
    results = []
    for job in jobs:
        try:
            results.append({"load": load, "save": save, "adapter": adapter}[job["op"]](job))
        except Exception as e:
            results.append({"error": f"{type(e).__name__}: {e}", "trace": traceback.format_exc()})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "bitsandbytes": bnb.__version__}
    with open(sys.argv[1] + ".out", "w") as f:
        json.dump({"versions": versions, "results": results}, f)


main()
