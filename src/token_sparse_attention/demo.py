"""The demo: the bundled model looks for facts hidden in a real document, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from token_sparse_attention import bundled
from token_sparse_attention.config import KVSamplingConfig
from token_sparse_attention.errors import loading, within_memory
from token_sparse_attention.info import provenance
from token_sparse_attention.integrations.record import LayerRecord
from token_sparse_attention.profile import LayerProfile
from token_sparse_attention.run import Answer, ask, encode_prompt, load_model, read, warm_up
from token_sparse_attention.settings import default_config

SHRINK = 16  # 128K tokens, which the model's profile is for, over the document's
MIN_CORRECT = 4
MAX_SEEN = 0.9  # share of a prompt's tokens that at least one layer must not exceed
_MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class Finding:
    """One question and both answers."""

    needle: bundled.Needle
    dense: Answer
    sparse: Answer

    @property
    def dense_correct(self) -> bool:
        """Whether the dense reply holds the answer."""
        return self.needle.answer in self.dense.text

    @property
    def sparse_correct(self) -> bool:
        """Whether the sparse reply holds the answer."""
        return self.needle.answer in self.sparse.text

    @property
    def sparsest(self) -> LayerRecord:
        """What the layer did whose queries saw the fewest tokens."""
        records = self.sparse.report.last_prefill() if self.sparse.report else []
        return min(records, key=seen_share)


@dataclass(frozen=True)
class DemoResult:
    """All findings, and whether they pass.

    Attributes:
        findings: one per fact.
        config_source: where the settings of the sparse path come from.
        provenance: device, versions and commit.
        reading_seconds: how long each path, dense and sparse, took to read the document.
    """

    findings: list[Finding]
    config_source: str
    provenance: dict[str, Any]
    reading_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def sparsest(self) -> LayerRecord:
        """What the sparsest layer did, in the prefill where it saw the largest share."""
        return max((finding.sparsest for finding in self.findings), key=seen_share)

    @property
    def summary(self) -> str:
        """How few tokens the sparsest layer saw, in words."""
        return _summary(self.sparsest)

    @property
    def failures(self) -> list[str]:
        """What the demo should have shown and did not."""
        failures = []
        for path in ("dense", "sparse"):
            correct = sum(getattr(finding, f"{path}_correct") for finding in self.findings)
            if correct < MIN_CORRECT:
                failures.append(
                    f"the {path} run answered {correct} questions of {len(self.findings)}, "
                    f"expected at least {MIN_CORRECT}"
                )
        if seen_share(self.sparsest) > MAX_SEEN:
            failures.append(f"no layer left out {1 - MAX_SEEN:.0%}: {self.summary}")
        return failures

    @property
    def note(self) -> str | None:
        """Why reading sparsely took longer; None where it did not."""
        if self.reading_seconds.get("sparse", 0.0) <= self.reading_seconds.get("dense", 0.0):
            return None
        return (
            "so short a document gains no time: by default it would run dense, and is sparse here "
            "only to show what is left out, and that the facts are found all the same"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "passed": not self.failures,
            "failures": self.failures,
            "note": self.note,
            "config_source": self.config_source,
            **self.provenance,
            "reading_seconds": self.reading_seconds,
            "seen_share": seen_share(self.sparsest),
            "findings": [
                {
                    "question": finding.needle.question,
                    "depth": finding.needle.depth,
                    "expected": finding.needle.answer,
                    "dense_correct": finding.dense_correct,
                    "sparse_correct": finding.sparse_correct,
                    "dense": finding.dense.to_dict(),
                    "sparse": finding.sparse.to_dict(),
                }
                for finding in self.findings
            ],
        }


def seen_share(record: LayerRecord) -> float:
    """Share of the prompt's tokens that a layer's sparse queries see, mean over the heads.

    For token selection these are the tokens kept. For KV sampling each query sees its window as
    well, in which a sampled key may lie, so it is at most that share.
    """
    if not isinstance(record.config, KVSamplingConfig):
        return record.kept_share
    window = record.config.sliding_window / record.kv_len
    return min(record.kept_share + window, 1.0)


def _summary(record: LayerRecord) -> str:
    share = f"{seen_share(record):.1%} of the prompt's tokens"
    if not isinstance(record.config, KVSamplingConfig):
        return f"the heads of layer {record.layer} kept {share}"
    last = record.config.dense_queries
    others = f", the last {last} aside" if last else ""
    return f"the queries of layer {record.layer} saw at most {share}, windows included{others}"


def demo_settings(name: str) -> tuple[LayerProfile, str]:
    """Return the bundled model's profile in proportion to the document, and what that is.

    Blocks, windows and samples are `SHRINK` times fewer, the layers are the profile's. The
    crossover is off: at the profile's own sizes a document this short is attended to densely.

    Args:
        name: the bundled model's folder.
    """
    profile, source = default_config(name)
    assert isinstance(profile, LayerProfile)
    assert isinstance(profile.base, KVSamplingConfig)
    base, samples = profile.base, "num_samples"
    layers = {
        layer: {**changes, samples: changes.get(samples, base.num_samples) // SHRINK}
        for layer, changes in profile.layers.items()
    }
    size = base.block_size // SHRINK
    base = replace(
        base,
        block_size=size,
        num_probes=min(base.num_probes, size // 4),
        sliding_window=base.sliding_window // SHRINK,
        crossover="off",
    )
    return LayerProfile(base, layers), f"{source}, blocks, windows and samples a sixteenth"


def run_demo(
    *,
    device: str = "auto",
    on_progress: Callable[[str], None] = lambda _: None,
    say: Callable[[str], object] = lambda _: None,
) -> DemoResult:
    """Ask the bundled model for every fact hidden in the bundled document.

    The document is read once densely and once sparsely; every question is asked on copies of
    both caches.

    Args:
        device: ``"auto"``, or a torch device.
        on_progress: told what is being done.
        say: told what `load_model` says.

    Raises:
        UsageError: if the model cannot be loaded onto the device.
        JobFailedError: if the device has too little memory.
    """
    on_progress("loading the bundled model")
    name = str(bundled.MODEL)
    with loading("the bundled model"):
        model, tokenizer = load_model(name, device=device, say=say)
    config, source = demo_settings(name)
    document = bundled.DEMO_DOCUMENT.read_text(encoding="utf-8")
    needles = bundled.demo_needles()
    prompts = [encode_prompt(tokenizer, document, needle.question) for needle in needles]
    document_ids = prompts[0][:, : common_length(prompts)]
    answers: dict[str, list[Answer]] = {"dense": [], "sparse": []}
    seconds: dict[str, float] = {}
    for path, settings in (("dense", None), ("sparse", config)):
        on_progress(f"{path}: reading a document of {document_ids.shape[1]:,} tokens")
        with within_memory(document_ids.shape[1], path):
            if not seconds:
                warm_up(model, tokenizer, document_ids)
            reading = read(model, document_ids, settings)
            seconds[path] = reading.seconds
            for number, prompt in enumerate(prompts, 1):
                on_progress(f"{path}: answering question {number} of {len(prompts)}")
                reply = ask(model, tokenizer, reading, prompt, _MAX_NEW_TOKENS)
                answers[path].append(reply)
    findings = [
        Finding(needle, answers["dense"][number], answers["sparse"][number])
        for number, needle in enumerate(needles)
    ]
    return DemoResult(findings, source, provenance(str(model.device)), seconds)


def common_length(prompts: Sequence[Tensor]) -> int:
    """Return how many first tokens prompts ``[1, S]`` share, less than the shortest has.

    Example:
        >>> common_length([torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 9]])])
        2
    """
    shortest = min(prompt.shape[1] for prompt in prompts) - 1
    same = torch.stack([prompt[0, :shortest] == prompts[0][0, :shortest] for prompt in prompts])
    return int(same.all(0).cumprod(0).sum())
