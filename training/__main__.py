"""Train the bundled model: ``python -m training --out DIR``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from . import evaluate, ranks
from .export import export
from .network import ARCHITECTURES
from .train import Options, Trainer

RUNS = {"base": Options.base, "long": Options.long}
"""The runs of the recipe, in order."""


def _stages(text: str) -> tuple[tuple[int, float], ...]:
    pairs = [part.split(":") for part in text.split(",")]
    return tuple((int(length), float(share)) for length, share in pairs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train the bundled retrieval model from Debian documentation packages.",
        epilog="example: python -m training --out runs/first; on two GPUs:"
        " torchrun --standalone --nproc-per-node 2 -m -- training --out runs/first",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the model, its state and its scores")
    add("--data", type=Path, help="folder of prepared data (made if missing; default OUT/data)")
    add("--packages", type=Path, help="folder of Debian packages (default OUT/packages)")
    add("--run", choices=[*RUNS, "all"], default="all", help="which run of the recipe")
    add("--start-from", type=Path, metavar="DIR", help="model folder with weights to begin with")
    add("--history", type=Path, metavar="FILE", help="training.json of the runs before")
    add("--minutes", type=float, help="training time of a run, in place of the recipe's")
    add("--stop-after", type=float, metavar="MIN", help="stop this call early; go on by --resume")
    add("--resume", type=Path, metavar="DIR", help="go on from the state saved in DIR")
    add("--stages", type=_stages, help="LENGTH:SHARE,... in place of the recipe's")
    add("--micro-batch", type=int, default=131072, help="tokens per forward pass")
    add("--accumulate", type=int, default=2, help="forward passes per step")
    add("--peak", type=float, help="highest learning rate, in place of the recipe's")
    add("--workers", type=int, default=14, help="processes that make samples")
    add("--architecture", choices=ARCHITECTURES, default="llama", help="llama is what ships")
    add("--layers", type=int, help="decoder layers (fewer for a smoke test)")
    add("--samples", type=int, default=100, help="held-out samples per task and length; 0: none")
    add("--lengths", default="1024,2048,4096,8192,16384", help="held-out context lengths")
    return parser


def _options(name: str, data: Path, args: argparse.Namespace, rank: int, world: int) -> Options:
    given = {
        field: getattr(args, field)
        for field in ("minutes", "stages", "peak")
        if getattr(args, field) is not None
    }
    return dataclasses.replace(
        RUNS[name](data),
        stop_after=args.stop_after,
        micro_batch=args.micro_batch,
        accumulate=args.accumulate,
        workers=args.workers,
        architecture=args.architecture,
        layers=args.layers,
        rank=rank,
        world=world,
        **given,
    )


def _train(options: Options, name: str, device: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run: leaves a model folder and a state, returns what to say about it."""
    trainer = Trainer(options, device)
    if args.resume:
        trainer.load(args.resume / "state.pt")
    elif args.start_from:
        trainer.start_from(args.start_from)
    trainer.run()
    if options.rank == 0:
        trainer.save(args.out / "state.pt")
        export(trainer.model, options.data, args.out / "model")
    ranks.wait()
    return {
        "run": name,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(trainer.elapsed),
        "longest_row": trainer.options.stages[-1][0],
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "processes": options.world,
        "sources": json.loads((options.data / "sources.json").read_text("utf-8")),
    }


def main() -> None:
    """Prepare the data if needed, train, export and evaluate."""
    args = _parser().parse_args()
    data = args.data or args.out / "data"
    rank, world = ranks.join()
    if rank == 0 and not (data / "prose.npy").exists():
        from .prepare import prepare

        prepare(args.packages or args.out / "packages", data, args.start_from)
    ranks.wait()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = json.loads(args.history.read_text("utf-8"))["runs"] if args.history else []
    for name in RUNS if args.run == "all" else [args.run]:
        runs.append(_train(_options(name, data, args, rank, world), name, device, args))
        args.start_from, args.resume = args.out / "model", None
    ranks.leave()
    if rank > 0:
        return
    training = json.dumps({"runs": runs}, indent=2)
    (args.out / "training.json").write_text(training + "\n", "utf-8")
    if args.samples:
        lengths = [int(length) for length in args.lengths.split(",")]
        folder = args.out / "model"
        scores = evaluate.evaluate(folder, data, lengths, args.samples, device)
        (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
        print(evaluate.show(scores))


if __name__ == "__main__":
    main()
