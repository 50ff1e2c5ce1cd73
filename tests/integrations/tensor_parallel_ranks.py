"""One rank of a tensor parallel model: runs every case and saves what came out of it."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.distributed import DistributedConfig

from integrations.models import CONFIG, SAMPLING, make_ids
from token_sparse_attention.integrations import transformers as integration
from token_sparse_attention.integrations.transformers import apply

PER_HEAD = dataclasses.replace(CONFIG, budget="per_head")
UNEQUAL = "Unequal"  # a model whose KV heads do not divide into the ranks
FAMILIES = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Olmo2": {},  # gathers all heads again before attention
    UNEQUAL: {"num_key_value_heads": 1},
}
CASES = {
    "shared": ("Llama", CONFIG, False),
    "per head": ("Llama", PER_HEAD, False),
    "padded": ("Llama", PER_HEAD, True),
    "normalised": ("Qwen3", CONFIG, False),
    "sampling": ("Llama", SAMPLING, False),
    "sampling, per head, padded": (
        "Qwen3",
        dataclasses.replace(SAMPLING, budget="per_head"),
        True,
    ),
    "dense heads, per head": (
        "Llama",
        dataclasses.replace(SAMPLING, budget="per_head", dense_heads=(1, 2)),
        False,
    ),
    "gathered": ("Olmo2", CONFIG, False),
}


def run_case(model, config, padded):
    """Prefill, then decode; returns what every layer kept, the logits, and the new tokens."""
    ids = make_ids(batch=2 if padded else 1)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :30] = 0
    with torch.no_grad(), apply(model, config) as report:
        logits = model(ids, attention_mask=mask).logits
        kept = [record.kept for record in report]
        new = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    return {
        "kept": kept,
        "reasons": [record.reasons for record in report],
        "logits": logits,
        "new": new[:, 200:].tolist(),
        "text": str(report),
    }


def run_batched(model):
    """The new tokens of two requests by continuous batching, and what their layers kept."""
    prompts = [make_ids(length, seed=length)[0].tolist() for length in (200, 120)]
    batching = ContinuousBatchingConfig(block_size=32, num_blocks=32, max_batch_tokens=512)
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1)
    with apply(model, CONFIG, continuous_batching=True) as report:
        out = model.generate_batch(
            prompts,
            generation_config=greedy,
            continuous_batching_config=batching,
            warmup=False,
        )
    return [result.generated_tokens for result in out.values()], [one.kept for one in report]


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    split = DistributedConfig(tp_plan="auto")
    models = {
        family: AutoModelForCausalLM.from_pretrained(
            folder / family, distributed_config=split
        ).eval()
        for family in FAMILIES
    }
    results = {
        name: run_case(models[family], config, padded)
        for name, (family, config, padded) in CASES.items()
    }
    results["batched"] = run_batched(models["Llama"])
    try:
        apply(models[UNEQUAL], CONFIG)
    except ValueError as error:
        results[UNEQUAL] = str(error)
    integration.tensor_parallel_group = lambda _model: None
    results["not exchanged"] = run_case(models["Llama"], CONFIG, False)["kept"]
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
