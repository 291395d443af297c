"""LoRA fine-tuning by transformers, bitsandbytes and peft on rows that wane exported: the other side of bench/finetune.lua.

    finetune.py --model FOLDER --rows train.jsonl --eval eval.jsonl --adapter FOLDER --quant nf4 --lr 2e-4 … --out result.json

Rows are {"input_ids": [...], "labels": [...]} in the order of training. --adapter holds the adapter to start from (PEFT's files), so that
both sides start from the same numbers. A plain loop, as Trainer's arithmetic is: loss normalised by the labels of the update, clipping,
linear schedule; dropout 0. Prints and writes losses, tokens a second, peak memory, perplexity of the held-out rows after training. With --steps 0 it
prints the perplexity before, in a process of its own: training after an evaluation learned next to nothing with bitsandbytes on the CPU.
"""

import argparse
import json
import math
import resource
import time

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_scheduler


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--rows", required=True)
    p.add_argument("--eval")
    p.add_argument("--adapter", required=True)
    p.add_argument("--quant", default="nf4", choices=["none", "nf4", "int8"])
    p.add_argument("--compute", default="bf16", choices=["bf16", "f32"])
    p.add_argument("--optim", default="adamw", choices=["adamw", "paged_adamw_8bit"])
    p.add_argument("--lr", type=float, default=2e-4)
    p.add_argument("--warmup", type=int, default=0)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--accumulate", type=int, default=1)
    p.add_argument("--clip", type=float, default=1.0)
    p.add_argument("--checkpointing", action="store_true")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--save")
    p.add_argument("--out")
    return p.parse_args()


def read_rows(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def batch_of(rows):
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, r in enumerate(rows):
        n = len(r["input_ids"])
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(r["input_ids"]), torch.tensor(r["labels"]), 1
    return ids, labels, mask


def summed_loss(model, rows, compute):
    ids, labels, mask = batch_of(rows)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == "bf16"):
        logits = model(input_ids=ids, attention_mask=mask).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].float().reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum")
    return nll, int((labels[:, 1:] != -100).sum()), ids.numel()


@torch.no_grad()
def perplexity(model, rows, compute):
    model.eval()
    total = count = 0.0
    for i in range(0, len(rows), 4):
        nll, n, _ = summed_loss(model, rows[i : i + 4], compute)
        total, count = total + float(nll), count + n
    return math.exp(total / count)


def load(o):
    torch.set_num_threads(o.threads)
    dtype = torch.bfloat16 if o.compute == "bf16" else torch.float32
    quant = None
    if o.quant == "nf4":
        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    elif o.quant == "int8":
        quant = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(o.model, quantization_config=quant, dtype=dtype)
    model.config.use_cache = False
    if o.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PeftModel.from_pretrained(model, o.adapter, is_trainable=True)


def optimizer_of(o, params):
    if o.optim == "adamw":
        return torch.optim.AdamW(params, lr=o.lr, weight_decay=0.0)
    import bitsandbytes

    return bitsandbytes.optim.PagedAdamW8bit(params, lr=o.lr, weight_decay=0.0)


def train(o, model, rows):
    params = [p for p in model.parameters() if p.requires_grad]
    opt = optimizer_of(o, params)
    schedule = get_scheduler("linear", opt, num_warmup_steps=o.warmup, num_training_steps=o.steps)
    model.train()
    losses, seconds, tokens, at = [], [], [], 0
    for _ in range(o.steps):
        started = time.perf_counter()
        micro = []
        for _ in range(o.accumulate):
            micro.append([rows[(at + i) % len(rows)] for i in range(o.batch)])
            at += o.batch
        count = sum(sum(x != -100 for x in r["labels"][1:]) for m in micro for r in m)
        loss, seen = 0.0, 0
        for m in micro:
            nll, _, n = summed_loss(model, m, o.compute)
            (nll / count).backward()
            loss, seen = loss + float(nll) / count, seen + n
        if o.clip > 0:
            torch.nn.utils.clip_grad_norm_(params, o.clip)
        opt.step()
        schedule.step()
        opt.zero_grad()
        losses.append(loss)
        seconds.append(time.perf_counter() - started)
        tokens.append(seen)
    return losses, seconds, tokens


def main():
    o = options()
    model = load(o)
    rows = read_rows(o.rows)
    held_out = read_rows(o.eval) if o.eval else None
    result = {"quant": o.quant, "compute": o.compute}
    if o.steps == 0:
        return print(json.dumps(dict(result, perplexity_before=perplexity(model, held_out, o.compute))))
    losses, seconds, tokens = train(o, model, rows)
    result["losses"] = losses
    middle = sorted(range(len(seconds)), key=lambda i: seconds[i] / tokens[i])[len(seconds) // 2]
    result["tokens_per_s"] = tokens[middle] / seconds[middle]
    if held_out:
        result["perplexity_after"] = perplexity(model, held_out, o.compute)
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if o.save:
        model.save_pretrained(o.save)
    print(json.dumps(result))
    if o.out:
        with open(o.out, "w") as f:
            json.dump(result, f)


main()
