"""What sparse prefill costs the bundled model: the same held-out questions, dense and sparse.

Every answer is generated greedily after a real prefill, one prompt at a time, and counts if it
is exactly right; unlike in `evaluate`, the answer is not part of what is read.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from token_sparse_attention import TokenSparseConfig, load_config
from token_sparse_attention.config import LayerProfile
from token_sparse_attention.info import provenance
from token_sparse_attention.run import PROFILE_FILE, answer, load_model

from .evaluate import material_of
from .probes import Maker, Probe

TASKS = ("marked", "single_2", "multikey_2", "multikey_3", "tracking")
_SEED = 770_000

Settings = TokenSparseConfig | LayerProfile | None


def settings_of(folder: Path) -> dict[str, Settings]:
    """Dense, the paper's rule in all layers, and the profile that ships with the model."""
    shipped = load_config(folder / PROFILE_FILE)
    return {"dense": None, "published": TokenSparseConfig.published(), "profile": shipped}


def measure(
    folder: Path,
    data: Path,
    lengths: list[int],
    samples: int,
) -> dict[str, Any]:
    """Per setting: whether each sample was answered rightly, and the kept share."""
    model, tokenizer = load_model(str(folder))
    origin = provenance(str(model.device))
    coder = tokenizer.backend_tokenizer
    material = material_of(coder, data)
    paths = settings_of(folder)
    results: dict[str, Any] = {
        name: {
            "settings": settings and json.loads(settings.to_json()),
            "right": {task: {} for task in TASKS},
            "kept_share": {str(length): [] for length in lengths},
        }
        for name, settings in paths.items()
    }
    began = time.monotonic()
    for length in lengths:
        for number, task in enumerate(TASKS):
            maker = Maker(material, length, _SEED + 100 * length + number)
            probes: list[Probe] = [getattr(maker, task)() for _ in range(samples)]
            for name, settings in paths.items():
                right = []
                for probe in probes:
                    reply = answer(
                        model,
                        tokenizer,
                        tokenizer(probe.prompt, return_tensors="pt")["input_ids"],
                        settings,
                        max_new_tokens=len(coder.encode(probe.answer).ids),
                    )
                    right.append(reply.text == probe.answer.strip())
                    if reply.report:
                        records = reply.report.last_prefill()
                        share = sum(record.kept_share for record in records) / len(records)
                        results[name]["kept_share"][str(length)].append(share)
                results[name]["right"][task][str(length)] = right
                elapsed = time.monotonic() - began
                print(f"{elapsed:6.0f} s  {length} {task} {name}: {sum(right)}", flush=True)
    return {
        "samples": samples,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": _SEED,
        **origin,
        "results": results,
    }


def interval(right: int, samples: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.96
    centre = (right + z * z / 2) / (samples + z * z)
    half = z / (samples + z * z) * math.sqrt(right * (samples - right) / samples + z * z / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def show(measured: dict[str, Any]) -> str:
    """A Markdown table: right answers per setting and length, all tasks together."""
    results, samples = measured["results"], measured["samples"]
    lengths = list(results["dense"]["kept_share"])
    lines = ["| settings | " + " | ".join(lengths) + " | tokens kept |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for name, result in results.items():
        cells = []
        for length in lengths:
            of_tasks = [by_length[length] for by_length in result["right"].values()]
            right, total = sum(map(sum, of_tasks)), samples * len(of_tasks)
            low, high = interval(right, total)
            cells.append(f"{right} of {total} ({low:.0%} to {high:.0%})")
        shares = [share for by_length in result["kept_share"].values() for share in by_length]
        kept = f"{sum(shares) / len(shares):.0%}" if shares else "all"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {kept} |")
    return "\n".join(lines)


def main() -> None:
    """Measure a model folder from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.sparsity",
        description="Measure what sparse prefill costs a model that ships a profile.",
        epilog="example: python -m training.sparsity"
        " --model src/token_sparse_attention/bundled/model --data build/model/data",
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared data")
    parser.add_argument("--samples", type=int, default=20, help="samples per task and length")
    parser.add_argument("--lengths", default="4096,8192", help="context lengths in tokens")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    measured = measure(args.model, args.data, lengths, args.samples)
    if args.out:
        args.out.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    print(show(measured))


if __name__ == "__main__":
    main()
