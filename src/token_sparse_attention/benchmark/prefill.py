"""`tsa bench prefill`: time to first token of a whole model, dense and sparse.

The model has the shape of a real one and random weights: what a prefill costs does not depend
on the weights, as the share of tokens to keep is given, or the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from token_sparse_attention.benchmark import timing
from token_sparse_attention.benchmark.checks import Verdict, judge
from token_sparse_attention.benchmark.options import PrefillOptions
from token_sparse_attention.benchmark.record import Record
from token_sparse_attention.config import (
    KVSamplingConfig,
    SparseConfig,
    TokenSelectionConfig,
)
from token_sparse_attention.integrations.record import PrefillReport
from token_sparse_attention.integrations.transformers import apply, register_dense_attention

_MIN_SAMPLES, _MAX_SAMPLES = 2, 10

Report = Callable[[str], object]


@dataclass(frozen=True)
class _Contender:
    """One way to run the model.

    Attributes:
        name: as in the records.
        layers: which run sparse.
        config: settings of those layers; None for a dense model.
        kept: share of the tokens to keep, None for KV sampling.
    """

    name: str
    layers: tuple[int, ...] = ()
    config: SparseConfig | None = None
    kept: float | None = None

    @classmethod
    def selecting(cls, group: str, layers: tuple[int, ...], kept: float) -> _Contender:
        config = TokenSelectionConfig(sparse_layers=layers, keep_ratio=kept)
        return cls(f"sparse/{group}", layers, config, kept)

    @classmethod
    def sampling(cls, group: str, layers: tuple[int, ...], samples: int) -> _Contender:
        config = KVSamplingConfig(num_samples=samples, sparse_layers=layers, crossover="off")
        return cls(f"samples-{samples}/{group}", layers, config)

    def switched_on(self, model: Any) -> AbstractContextManager[PrefillReport | None]:
        return nullcontext() if self.config is None else apply(model, self.config)

    def too_short(self, seq_len: int) -> str:
        """Why a prompt has nothing to leave out, empty if it has."""
        if not isinstance(self.config, KVSamplingConfig):
            return ""
        seen = self.config.sliding_window + self.config.sink_size
        return f"no longer than window and sinks: {seen:,} tokens" if seq_len <= seen else ""


@torch.no_grad()
def measure(options: PrefillOptions, report: Report = lambda _: None) -> Iterator[Record]:
    """Yield every record of a run, in order; `report` is told what is being measured."""
    report("building the model")
    model = _build_model(options)
    every = tuple(range(options.num_layers))
    groups = {"half": every[options.num_layers // 2 :], "all": every}
    contenders = [_Contender("dense")]
    for group, layers in groups.items():
        contenders += [_Contender.selecting(group, layers, kept) for kept in options.kept]
        contenders += [_Contender.sampling(group, layers, count) for count in options.samples]
    report("checking")
    verdict = _check(model, options, every)
    for seq_len in sorted(options.lengths):
        ids = _random_ids(options, seq_len)
        for contender in contenders:
            kept = "" if contender.kept is None else f", kept {contender.kept:g}"
            report(f"{seq_len:,} tokens: {contender.name}{kept}")
            if note := contender.too_short(seq_len):
                yield _record(options, seq_len, contender, "skipped", note=note)
                continue
            try:
                yield from _measure_one(model, options, ids, contender, verdict)
            except torch.OutOfMemoryError as error:
                yield _record(
                    options, seq_len, contender, "skipped", note=str(error).splitlines()[0]
                )
            timing.free_memory(options.torch_device)


def _build_model(options: PrefillOptions) -> Any:
    config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        num_key_value_heads=options.num_kv_heads,
        vocab_size=options.vocab_size,
        max_position_embeddings=max(options.lengths),
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        eos_token_id=None,
    )
    with options.torch_device:  # straight to the device: weights this size take a while
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=options.torch_dtype, attn_implementation=register_dense_attention()
        )
    return model.eval()


def _random_ids(options: PrefillOptions, seq_len: int) -> Tensor:
    generator = torch.Generator(options.torch_device).manual_seed(seq_len)
    shape = (1, seq_len)
    return torch.randint(
        options.vocab_size, shape, generator=generator, device=options.torch_device
    )


def _last_logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, logits_to_keep=1, use_cache=True).logits[0, -1]
    return logits


def _check(model: Any, options: PrefillOptions, layers: tuple[int, ...]) -> Verdict:
    """Compare logits with every token kept or sampled in every layer with dense ones.

    What two dense kernels differ by, twice, is the bound.
    """
    shortest = min(options.lengths)
    ids = _random_ids(options, shortest)
    implementation = model.config._attn_implementation
    dense = _last_logits(model, ids).double()
    model.set_attn_implementation("sdpa")
    other_dense = _last_logits(model, ids).double()
    model.set_attn_implementation(implementation)
    bound = 2 * float((other_dense - dense).norm() / dense.norm())
    bound += 4 * torch.finfo(options.torch_dtype).eps
    error, notes = 0.0, []
    contenders = [_Contender.selecting("all", layers, 1.0)]
    if options.samples:
        contenders.append(_Contender.sampling("all", layers, shortest))
    for contender in contenders:
        if contender.too_short(shortest):
            continue
        with contender.switched_on(model) as report:
            sparse = _last_logits(model, ids).double()
        error = max(error, float((sparse - dense).norm() / dense.norm()))
        notes += _ran_dense(report, layers)
    return judge(error, bound, notes)


def _ran_dense(report: PrefillReport | None, layers: tuple[int, ...]) -> list[str]:
    if report is None:
        return []
    sparse = {record.layer for record in report.last_prefill() if record.paths == ["sparse"]}
    dense = sorted(set(layers) - sparse)
    return [f"layers {dense} ran dense"] if dense else []


def _measure_one(
    model: Any, options: PrefillOptions, ids: Tensor, contender: _Contender, verdict: Verdict
) -> Iterator[Record]:
    seq_len, device = ids.shape[1], options.torch_device
    first_token = partial(_first_token, model, ids)
    with contender.switched_on(model) as report:
        # The first pass also fills the allocator's cache.
        peak = timing.peak_extra_mib(partial(_last_logits, model, ids), device)
        wrong = "; ".join(filter(None, [verdict.note, *_ran_dense(report, contender.layers)]))
        times_ms = [timing.wall_ms(first_token, device)]
        wanted = int(options.budget_seconds * 1e3 / times_ms[0])
        for _ in range(max(min(wanted, _MAX_SAMPLES), _MIN_SAMPLES) - 1):
            times_ms.append(timing.wall_ms(first_token, device))
    checked: dict[str, Any] = {"peak_extra_mib": peak, "error": verdict.error, "passed": not wrong}
    taken = timing.summarize("eager", times_ms, wrong)
    yield _record(options, seq_len, contender, **taken._asdict(), **checked)


def _first_token(model: Any, ids: Tensor) -> int:
    return int(_last_logits(model, ids).argmax())


def _record(
    options: PrefillOptions, seq_len: int, contender: _Contender, kind: str, **fields: Any
) -> Record:
    return Record(
        suite="prefill",
        name=contender.name,
        kind=kind,
        batch=1,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        head_dim=options.hidden_size // options.num_heads,
        seq_len=seq_len,
        dtype=options.dtype,
        kept=contender.kept,
        **fields,
    )
