"""Train the bundled model: ``python -m training --out DIR``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import evaluate
from .export import export
from .train import STAGES, Options, Trainer


def _stages(text: str) -> tuple[tuple[int, float], ...]:
    pairs = [part.split(":") for part in text.split(",")]
    return tuple((int(length), float(share)) for length, share in pairs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train the bundled retrieval model from Debian documentation packages.",
        epilog="example: python -m training --out runs/first --minutes 16",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the model, its state and its scores")
    add("--data", type=Path, help="folder of prepared data (made if missing; default OUT/data)")
    add("--packages", type=Path, help="folder of Debian packages (default OUT/packages)")
    add("--minutes", type=float, default=16.0, help="training time of the whole schedule")
    add("--stop-after", type=float, metavar="MIN", help="stop this call early; go on by --resume")
    add("--resume", type=Path, metavar="DIR", help="go on from the state saved in DIR")
    add("--stages", type=_stages, default=STAGES, help="LENGTH:SHARE,... of the training time")
    add("--micro-batch", type=int, default=131072, help="tokens per forward pass")
    add("--accumulate", type=int, default=2, help="forward passes per step")
    add("--peak", type=float, default=2e-3, help="highest learning rate")
    add("--workers", type=int, default=14, help="processes that make samples")
    add("--layers", type=int, default=14, help="decoder layers (fewer for a smoke test)")
    add("--samples", type=int, default=100, help="held-out samples per task and length; 0: none")
    add("--lengths", default="1024,2048,4096,8192,16384", help="held-out context lengths")
    return parser


def main() -> None:
    """Prepare the data if needed, train, export and evaluate."""
    args = _parser().parse_args()
    data = args.data or args.out / "data"
    if not (data / "prose.npy").exists():
        from .prepare import prepare

        prepare(args.packages or args.out / "packages", data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(
        data=data,
        minutes=args.minutes,
        stop_after=args.stop_after,
        stages=args.stages,
        micro_batch=args.micro_batch,
        accumulate=args.accumulate,
        peak=args.peak,
        workers=args.workers,
        layers=args.layers,
    )
    trainer = Trainer(options, device)
    if args.resume:
        trainer.load(args.resume / "state.pt")
    trainer.run()
    trainer.save(args.out / "state.pt")
    export(trainer.model, data, args.out / "model")
    training = {
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(trainer.elapsed),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "sources": json.loads((data / "sources.json").read_text("utf-8")),
    }
    (args.out / "training.json").write_text(json.dumps(training, indent=2) + "\n", "utf-8")
    if args.samples:
        lengths = [int(length) for length in args.lengths.split(",")]
        folder = args.out / "model"
        scores = evaluate.evaluate(folder, data, lengths, args.samples, device)
        (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", "utf-8")
        print(evaluate.show(scores))


if __name__ == "__main__":
    main()
