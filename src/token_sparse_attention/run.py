"""The main job: a language model reads a long document sparsely and answers a question."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer

from token_sparse_attention.attention.names import parse_backend, pattern_config
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.errors import UsageError, tokenizing
from token_sparse_attention.integrations.record import PrefillReport
from token_sparse_attention.integrations.transformers import apply, attention_of_every_layer
from token_sparse_attention.methods import method_of
from token_sparse_attention.profile import (
    LayerProfile,
    layer_configs,
    without_crossover,
)

_WARM_UP_TOKENS = 256
_POSITIONS = re.compile(r"\bwpe$|position[^.]*$")  # modules that hold an embedding per position
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Answer:
    """What the model said, and how long it took.

    Attributes:
        text: the decoded reply.
        prompt_tokens: length of the prompt.
        new_tokens: length of the reply.
        time_to_first_token: seconds from the start of the prefill to the first token.
        total_time: seconds to the end of the reply.
        report: what the layers did; None for a dense run.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    time_to_first_token: float
    total_time: float
    report: PrefillReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as JSON-ready values."""
        fields: dict[str, Any] = {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "time_to_first_token_s": self.time_to_first_token,
            "total_time_s": self.total_time,
        }
        if self.report is not None:
            fields["layers"] = [record.to_dict() for record in self.report.last_prefill()]
        return fields


@dataclass(frozen=True)
class Reading:
    """The beginning of prompts, read once for all of them.

    Attributes:
        cache: its keys and values; `ask` takes copies.
        tokens: how many tokens it has.
        seconds: how long reading took.
        report: what the layers did; None for a dense run.
    """

    cache: DynamicCache
    tokens: int
    seconds: float
    report: PrefillReport | None = None


def pick_device(device: str) -> str:
    """Return `device`, or for ``"auto"`` the first CUDA device if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


# Models and tokenizers are typed Any: transformers' Auto classes return no usable types.
def load_model(
    name: str,
    *,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], object] = lambda _: None,
    warn: Callable[[str], object] = lambda _: None,
) -> tuple[Any, Any]:
    """Load a checkpoint and its tokenizer; safetensors only.

    Args:
        name: hub id or folder.
        device: ``"auto"``, or a torch device; not read with a `device_map`.
        device_map: how accelerate spreads the layers over several devices, as for
            ``from_pretrained``; None for all on `device`.
        dtype: ``"auto"`` for the checkpoint's own, or float32 where that is a half precision
            for which the processor has no units; or a torch dtype's name.
        trust_remote_code: whether code that comes with the checkpoint may run.
        say: told if the model runs in another dtype than the checkpoint's.
        warn: told if the checkpoint holds weights that the model has no place for.

    Raises:
        ValueError: if the checkpoint lacks weights, in whose place random numbers would stand.
    """
    if device_map is None:
        torch.zeros(1, device=pick_device(device)).item()  # raises where it cannot be used
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if dtype == "auto" and device_map is None and torch.device(pick_device(device)).type == "cpu":
        stored = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).dtype
        if lacks_units(stored):
            dtype = "float32"
            short = str(stored).removeprefix("torch.")
            say(f"this processor has no {short} units, so the model runs in float32")
    load: Any = AutoModelForCausalLM.from_pretrained
    model, loaded = load(
        name,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"the checkpoint has no weights for {missing[0]}, and lacks {len(missing)} in all"
        )
    if surplus := sorted(loaded["unexpected_keys"]):
        warn(
            f"the model has no place for {len(surplus)} of the checkpoint's weights, such as "
            f"{surplus[0]}; if config.json is not of this checkpoint, replies are wrong"
        )
    if device_map is None:
        model = model.to(pick_device(device))
    return model.eval(), tokenizer


def lacks_units(dtype: torch.dtype | None) -> bool:
    """Return whether this processor computes in a half precision without units of its own.

    Such a processor, with AVX2 but neither AVX-512 nor AMX, is faster in float32.
    """
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def encode_prompt(tokenizer: Any, document: str, question: str | None) -> Tensor:
    """Return the prompt's token ids ``[1, S]``, through the chat template if there is one.

    Raises:
        UsageError: if the tokenizer or its template fails.
    """
    prompt = document if question is None else f"{document.rstrip()}\n\n{question}\n"
    if tokenizer.chat_template is None:
        with tokenizing():
            encoded = tokenizer(prompt, return_tensors="pt")
    else:
        with tokenizing("the tokenizer's chat template"):
            encoded = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
    ids: Tensor = encoded["input_ids"]
    return ids


def check_prompt(model: Any, ids: Tensor, new_tokens: int = 0) -> None:
    """Raise unless a model can read a prompt and write a reply.

    Args:
        model: the model.
        ids: ``[1, S]`` token ids of the prompt.
        new_tokens: most tokens of the reply.

    Raises:
        UsageError: if the prompt has no token, the model has no embedding for one of its tokens,
            or it has none for one of the positions.
    """
    if not ids.numel():
        raise UsageError("a prompt must have at least one token, got none")
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = int(ids.max())
    if largest >= vocabulary:
        raise UsageError(
            f"the tokenizer must be the model's, of {vocabulary} tokens; got token {largest}"
        )
    limit, length = context_limit(model), ids.shape[1] + new_tokens
    if limit is not None and length > limit and _learns_positions(model):
        raise UsageError(
            f"prompt and reply must fit the {limit} positions that this model has embeddings "
            f"for, got {ids.shape[1]} and {new_tokens} tokens"
        )


def _learns_positions(model: Any) -> bool:
    """Return whether a model has an embedding for each position, and so none for further ones."""
    return any(
        isinstance(module, nn.Embedding) and _POSITIONS.search(name)
        for name, module in model.named_modules()
    )


class FirstTokenClock(BaseStreamer):
    """Notes when the first generated token reaches the host."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first_token: float | None = None
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:  # noqa: ARG002
        if self._prompt_seen and self.first_token is None:
            self.first_token = time.perf_counter() - self.start
        self._prompt_seen = True

    def end(self) -> None:
        pass


def context_limit(model: Any) -> int | None:
    """Return how many positions the model was made for, None if it does not say."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit


def warm_up(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    config: SparseConfig | LayerProfile | None = None,
    *,
    impl: str = "auto",
    attention_backend: str | PatternConfig = "auto",
    whole: bool = False,
) -> None:
    """Answer the prompt's beginning, so that one-time costs stay out of the first answer's time.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        ids: ``[1, S]`` token ids of the prompt.
        config: settings to answer by as well, at the shortest length that they read sparsely,
            which compiles the kernels that they need; None for none.
        impl: see `Execution`.
        attention_backend: see `Execution`.
        whole: read the whole prompt densely, not only its beginning, so that the first of two
            answers does not pay for the memory of both.
    """
    most = ids.shape[1] if whole else _WARM_UP_TOKENS
    lengths: list[tuple[SparseConfig | LayerProfile | None, int]] = [(None, most)]
    if config is not None:
        eager = without_crossover(config)
        lengths.append((eager, shortest_sparse_prompt(model, eager)))
    for settings, length in lengths:
        answer(
            model, tokenizer, ids[:, :length], settings,
            max_new_tokens=2, impl=impl, attention_backend=attention_backend,
        )  # fmt: skip


def shortest_sparse_prompt(model: Any, config: SparseConfig | LayerProfile) -> int:
    """Return how many tokens a prompt must have to run sparse in every layer that ever does.

    Args:
        model: the model.
        config: the settings; 1 if no layer ever runs sparse.
    """
    sizes = model.config.get_text_config(decoder=True)
    num_heads = sizes.num_attention_heads
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // num_heads
    gates = (
        method_of(layer_config).gate(model.device, num_heads, head_dim)
        for layer_config in layer_configs(config, sizes.num_hidden_layers).values()
    )
    return max((gate.shortest_prompt or 1 for gate in gates), default=1)


def answer(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    config: SparseConfig | LayerProfile | None,
    *,
    max_new_tokens: int = 64,
    impl: str = "auto",
    attention_backend: str | PatternConfig = "auto",
    record_tokens: bool = False,
) -> Answer:
    """Answer a prompt greedily: sparsely under `config`, or densely if it is None.

    Dense attention is by the same kernel in both, in layers that run dense as well.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        ids: ``[1, S]`` token ids of the prompt.
        config: the settings, or None.
        max_new_tokens: at most this many tokens are generated.
        impl: see `Execution`.
        attention_backend: see `Execution`; a pattern runs in every layer, the
            dense ones too. Without settings ``"auto"`` takes a pattern's place.
        record_tokens: whether the report lists the tokens that each head attended to.
    """
    with _switched(model, config, impl, attention_backend, record_tokens) as report:
        return _generate(model, tokenizer, ids, max_new_tokens, report)


def read(model: Any, ids: Tensor, config: SparseConfig | LayerProfile | None) -> Reading:
    """Read what several prompts begin with: sparsely under `config`, or densely if it is None.

    Args:
        model: the model.
        ids: ``[1, S]`` token ids.
        config: the settings, or None.
    """
    ids, cache = ids.to(model.device), DynamicCache()
    with _switched(model, config, "auto", "auto") as report, torch.no_grad():
        _wait(ids)
        start = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        _wait(ids)
        return Reading(cache, ids.shape[1], time.perf_counter() - start, report)


def ask(model: Any, tokenizer: Any, reading: Reading, ids: Tensor, max_new_tokens: int) -> Answer:
    """Answer a prompt greedily whose beginning was read; what follows it is attended densely.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        reading: of the prompt's first tokens; its cache stays as it is.
        ids: ``[1, S]`` token ids of the whole prompt.
        max_new_tokens: at most this many tokens are generated.

    Returns:
        The answer; its times begin behind what was read, its report is that of the reading.
    """
    cache = copy.deepcopy(reading.cache)
    with _switched(model, None, "auto", "auto"):
        return _generate(model, tokenizer, ids, max_new_tokens, reading.report, cache)


@contextmanager
def _switched(
    model: Any,
    config: SparseConfig | LayerProfile | None,
    impl: str,
    attention_backend: str | PatternConfig,
    record_tokens: bool = False,
) -> Iterator[PrefillReport | None]:
    """Let a model attend sparsely under `config`, densely without; see `answer`."""
    backend = parse_backend(attention_backend)
    if config is None:
        with attention_of_every_layer(model, "auto" if pattern_config(backend) else backend):
            yield None
        return
    with (
        attention_of_every_layer(model, backend),
        apply(
            model, config, impl=impl, attention_backend=backend, record_tokens=record_tokens
        ) as report,
    ):
        yield report


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)


@torch.no_grad()
def _generate(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    max_new_tokens: int,
    report: PrefillReport | None,
    cache: DynamicCache | None = None,
) -> Answer:
    ids = ids.to(model.device)
    _wait(ids)
    clock = FirstTokenClock()
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        streamer=clock,
        past_key_values=cache,
    )
    total_time = time.perf_counter() - clock.start
    new = generated[0, ids.shape[1] :]
    return Answer(
        text=tokenizer.decode(new, skip_special_tokens=True).strip(),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        time_to_first_token=clock.first_token or total_time,
        total_time=total_time,
        report=report,
    )
