"""Time every layer's attention on a model's own queries and keys, dense and under settings.

    python -m benchmarks.block_sparse.layer_times --samples samples.jsonl.gz --per-length 3 \\
        --config flexprefill --config 'both=flexprefill+published' --out times.json

Patterns and budgets depend on what is attended to, so random inputs would not do. The model
reads each prompt densely; at every layer, each setting attends to the same query, key and value,
in turns with dense attention. A speed-up is the sum over all layers of the dense times, over the
sum of the setting's times; settings take `tsa eval`'s form.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.block_sparse.observed import prefill_with
from benchmarks.command import make_parser, run_command
from rich.console import Console
from rich.progress import track
from torch import Tensor

from token_sparse_attention import Execution, bundled, run, token_sparse_attention
from token_sparse_attention.attention.resolve import causal_attention
from token_sparse_attention.benchmark.timing import wall_times
from token_sparse_attention.evaluation import generate
from token_sparse_attention.evaluation.samples import Sample, SampleSet
from token_sparse_attention.evaluation.settings import Configuration, read_runs
from token_sparse_attention.info import provenance
from token_sparse_attention.profile import layer_configs

Times = dict[str, list[dict[str, float]]]  # by configuration, one entry per layer


def layer_times(
    model: Any,
    ids: Tensor,
    configurations: Mapping[str, Configuration],
    *,
    backend: str = "auto",
    budget: float = 0.1,
    repeat_heads: int = 1,
) -> Times:
    """Return the times of each layer's attention in one prefill, in milliseconds.

    Args:
        model: a causal language model on transformers' attention interface.
        ids: ``[1, S]`` token ids.
        configurations: what to time beside ``"dense"``.
        backend: the kernel of dense attention.
        budget: seconds to spend on each time.
        repeat_heads: take each head this many times, as a model with more heads would be.
    """
    num_layers = model.config.num_hidden_layers
    configs = {
        name: layer_configs(one.settings, num_layers) if one.settings is not None else {}
        for name, one in configurations.items()
    }
    times: Times = defaultdict(list)

    def timed(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise ValueError("prompts must come one by one, without padding; got a mask")

        answer = causal_attention(query, key, value, scale=scaling, backend=backend)
        query, key, value = (one.repeat(1, repeat_heads, 1, 1) for one in (query, key, value))

        def dense(by: str = backend) -> Tensor:
            return causal_attention(query, key, value, scale=scaling, backend=by)

        calls: dict[str, Callable[[], Tensor]] = {"dense": dense}
        for name, one in configurations.items():
            config = configs[name].get(module.layer_idx)
            by = one.pattern or backend
            how = Execution(attention_backend=by)
            if config is None:
                calls[name] = lambda by=by: dense(by)  # type: ignore[misc]
            else:
                calls[name] = lambda how=how, config=config: token_sparse_attention(  # type: ignore[misc]
                    query, key, value, config, scale=scaling, execution=how
                )
        for name, timing in zip(calls, wall_times(list(calls.values()), query.device, budget)):
            times[name].append(
                {"median_ms": timing.median_ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
            )
        return answer.transpose(1, 2).contiguous(), None

    prefill_with(timed, model, ids)
    return dict(times)


def speed_up(times: Times, name: str) -> float:
    """Return dense time over a configuration's, each summed over all layers."""
    dense, own = (sum(t["median_ms"] for t in times[which]) for which in ("dense", name))
    return dense / own


def main(argv: Sequence[str] | None = None) -> int:
    """Time what the command line names."""
    parser = make_parser("benchmarks.block_sparse.layer_times", __doc__)
    parser.add_argument("--model", default=str(bundled.MODEL))
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--per-length", type=int, default=3, help="samples of each length")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--budget-seconds", type=float, default=0.1)
    parser.add_argument("--repeat-heads", type=int, default=1, help="take each head N times")
    parser.add_argument("--out", type=Path, required=True)
    return run_command(parser, _run, argv)


def _run(args: argparse.Namespace) -> bool:
    samples = SampleSet.load(args.samples)
    model, tokenizer = run.load_model(args.model, device=args.device)
    configurations = read_runs(args.config, args.model)
    content = new_content(
        args.model,
        model,
        samples,
        attention_backend=args.attention_backend,
        repeat_heads=args.repeat_heads,
        configurations={name: one.to_dict() for name, one in configurations.items()},
    )
    for sample in track(
        some_of_each_length(samples, args.per_length), console=Console(stderr=True)
    ):
        ids = generate.encode(model, tokenizer, sample.prompt, sample.max_new_tokens)
        times = layer_times(
            model,
            ids,
            configurations,
            backend=args.attention_backend,
            budget=args.budget_seconds,
            repeat_heads=args.repeat_heads,
        )
        facts = {"task": sample.task, "length": sample.length, "index": sample.index}
        speed = {name: speed_up(times, name) for name in configurations}
        content["samples"].append({**facts, "speed_up": speed, "layers": times})
        args.out.write_text(json.dumps(content), encoding="utf-8")
        print(facts, {name: round(value, 2) for name, value in speed.items()}, flush=True)
    return True


def new_content(name: str, model: Any, samples: SampleSet, **asked: Any) -> dict[str, Any]:
    """Return a result file's content before anything is measured.

    Args:
        name: what the model was asked for by.
        model: the model, on its device.
        samples: where the prompts are from.
        asked: further arguments to record.
    """
    return {
        "provenance": provenance(str(model.device)),
        "arguments": {
            "model": "bundled" if name == str(bundled.MODEL) else name,
            "seed": samples.seed,
            "samples_sha256": samples.digest(),
            **asked,
        },
        "samples": [],
    }


def some_of_each_length(samples: SampleSet, per_length: int) -> list[Sample]:
    """The first samples of each length, the tasks taking turns."""
    chosen: dict[int, list[Sample]] = defaultdict(list)
    for sample in sorted(samples.samples, key=lambda one: (one.index, one.task)):
        if len(chosen[sample.length]) < per_length:
            chosen[sample.length].append(sample)
    return [sample for length in sorted(chosen) for sample in chosen[length]]


if __name__ == "__main__":
    sys.exit(main())
