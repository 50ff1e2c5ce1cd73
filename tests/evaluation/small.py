"""A tiny model in a folder, and samples for it that need no lm-eval."""

from __future__ import annotations

import shutil

from cli.commands import run
from integrations.models import make_model
from token_sparse_attention import bundled
from token_sparse_attention.evaluation.samples import Sample, SampleSet, pack_doc

CONFIG = (
    '{"method": "token_selection", "drop_mass": 0.4, "observation_window": 8, "pool_size": 3, '
    '"min_tokens": 8}'
)


def save_model(folder) -> str:
    """A random model with the bundled tokenizer."""
    make_model(vocab_size=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.MODEL / name, folder)
    return str(folder)


def make_samples(count: int = 3, lm_eval: str = "0.4.13") -> SampleSet:
    samples = []
    for index in range(count):
        context = "".join(f"The number of {n * 7 + index} is {n}. " for n in range(30))
        doc = {"input": context, "outputs": [str(index)], "max_length": 512}
        prompt = context + "The number is"
        packed = pack_doc(doc, prompt)
        samples.append(Sample("niah_single_1", 512, index, prompt, [], 6, packed))
    return SampleSet(lm_eval, "bundled", False, 0, [512], count, {"niah_single_1": 1.0}, samples)


def run_eval(*arguments: str) -> int:
    """`tsa eval`, whose errors are raised."""
    return run("eval", *arguments)
