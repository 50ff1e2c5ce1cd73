"""vLLM engines and transformers models that should say the same."""

from __future__ import annotations

import dataclasses
import random
from contextlib import nullcontext

import torch

from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig, bundled

# Harsh enough to change what the model says, so that equal replies mean equal selections.
CONFIG = TokenSelectionConfig(
    drop_mass=0.6,
    observation_window=32,
    min_tokens=64,
    sparse_layers=(1, 2, 3, 5, 8, 9, 10, 12),
)
# Every query is kept; with more samples than these, replies stay as dense.
SAMPLING = KVSamplingConfig(
    block_size=32,
    num_probes=8,
    sliding_window=32,
    sink_size=1,
    num_samples=6,
    budget="per_head",
    dense_queries=2,
    crossover="off",
    sparse_layers=tuple(range(14)),
)
HEADS = dataclasses.replace(SAMPLING, budget="shared", dense_heads=(1, 5))
NEW_TOKENS = 32


def additional_config(**changes):
    given = {"config": CONFIG.to_dict(), "log_interval": 0} | changes
    return {"token_sparse_attention": given}


def engine_arguments(**changes):
    return {
        "model": str(bundled.MODEL),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 2**28,  # of each engine, all of it in use from the start
        "enable_prefix_caching": False,
        "attention_backend": "CUSTOM",
        "additional_config": additional_config(),
    } | changes


def start_engine(**changes):
    from vllm import LLM

    return LLM(**engine_arguments(**changes))


def sampling(**changes):
    from vllm import SamplingParams

    return SamplingParams(**({"max_tokens": NEW_TOKENS, "temperature": 0} | changes))


def prompt_ids(tokens: int, seed: int = 0) -> list[int]:
    """Return a question about a number hidden in a piece of the demo document."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    chance = random.Random(seed)
    document = bundled.DEMO_DOCUMENT.read_text(encoding="utf-8")
    ids = tokenizer(document)["input_ids"]
    name = chance.choice(("quick-otter", "silent-bridge", "golden-ticket", "hollow-anchor"))
    number = chance.randrange(10**6, 10**7)
    fact = tokenizer(f"\nOne of the special magic numbers for {name} is: {number}.\n")["input_ids"]
    question = tokenizer(
        f"\n\nWhat is the special magic number for {name} mentioned in the provided text?\n"
    )["input_ids"]
    start = chance.randrange(len(ids) - tokens)
    text = ids[start : start + tokens - len(fact) - len(question)]
    position = chance.randrange(len(text))
    return text[:position] + fact + text[position:] + question


def generate(engine, prompts, **changes) -> list[list[int]]:
    """Return the reply to each prompt; all of them are there before the first step."""
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts], sampling(**changes), use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def hf_generate(model, ids, config=CONFIG, max_new_tokens=NEW_TOKENS, **changes):
    """Return a transformers model's reply, and the report if it ran with a config."""
    from token_sparse_attention.integrations.transformers import apply

    def run():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=max_new_tokens, do_sample=False, **changes
        )
        return out[0, len(ids) :].tolist()

    if config is None:
        return run(), None
    with apply(model, config) as report:
        return run(), report


@torch.no_grad()
def hf_logprobs(model, ids, config, reply, chunk):
    """The logprobs before each token of a reply, and the report.

    The prompt is prefilled in chunks under the config, None for dense, the reply densely.
    """
    from transformers import DynamicCache

    from token_sparse_attention.integrations.transformers import apply

    cache = DynamicCache()
    with nullcontext() if config is None else apply(model, config) as report:
        for first in range(0, len(ids), chunk):
            part = torch.tensor([ids[first : first + chunk]])
            last = model(part, past_key_values=cache, use_cache=True).logits[0, -1:]
    rest = model(torch.tensor([reply]), past_key_values=cache, use_cache=True).logits[0, :-1]
    return torch.cat((last, rest)).log_softmax(-1), report


def gaps(logprobs, reply) -> list[float]:
    """How far each token of a reply is from the likeliest one, in nats."""
    own = logprobs.gather(1, torch.tensor(reply)[:, None])[:, 0]
    return (logprobs.amax(1) - own).tolist()


def gained(before: dict, after: dict) -> dict:
    """Return what counts, or counts by reason, gained; reasons without gain are left out."""
    gains = {}
    for name, count in after.items():
        if isinstance(count, dict):
            gains[name] = {key: gain for key, gain in gained(before[name], count).items() if gain}
        else:
            gains[name] = count - before.get(name, 0)
    return gains
