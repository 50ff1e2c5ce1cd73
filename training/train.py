"""The training loop: a curriculum of row lengths by wall clock, resumable."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import ranks
from .batches import TASKS, Batch, Feed
from .network import Forward, make_config, make_model
from .samples import ANSWER, REPEAT, SENTENCE, TEXT

STAGES = (
    (256, 0.03),
    (512, 0.09),
    (1024, 0.10),
    (2048, 0.16),
    (4096, 0.24),
    (8192, 0.22),
    (16384, 0.16),
)
"""Row length and share of the training time."""

LONG_STAGES = (
    (4096, 0.13),
    (16384, 0.27),
    (32768, 0.24),
    (65536, 0.20),
    (131072, 0.16),
)
"""The same for the second run, which goes on to long rows."""


@dataclass(frozen=True)
class Options:
    """What a training run needs to know."""

    data: Path
    minutes: float = 16.0
    stop_after: float | None = None
    stages: tuple[tuple[int, float], ...] = STAGES
    micro_batch: int = 131072
    accumulate: int = 2
    peak: float = 2e-3
    last: float = 5e-5
    plateau: float = 0.3
    warmup: int = 100
    workers: int = 14
    seed: int = 1
    log_every: int = 50
    architecture: str = "llama"
    layers: int | None = None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.accumulate % self.world:
            raise ValueError(
                f"accumulate must be divisible by the {self.world} processes, so that each does"
                f" its share of a step; got {self.accumulate}"
            )

    @classmethod
    def base(cls, data: Path) -> Options:
        """The first run: from nothing to rows of 16,384 tokens."""
        return cls(data)

    @classmethod
    def long(cls, data: Path) -> Options:
        """The second run: on from the first one's weights to rows of 131,072 tokens."""
        return cls(
            data, minutes=7.0, stages=LONG_STAGES, peak=6e-4, last=2e-5, plateau=0.2, seed=2
        )


def stage_length(stages: tuple[tuple[int, float], ...], progress: float) -> int:
    """Row length of the stage that ``progress`` (0 to 1) falls into."""
    edge = 0.0
    for length, share in stages:
        edge += share
        if progress < edge:
            return length
    return stages[-1][0]


def learning_rate(options: Options, step: int, progress: float) -> float:
    """Warm-up by steps, a plateau, then a cosine over the rest of the time."""
    if step < options.warmup:
        return options.peak * (step + 1) / options.warmup
    if progress < options.plateau:
        return options.peak
    fall = min(1.0, (progress - options.plateau) / (1 - options.plateau))
    return options.last + (options.peak - options.last) * 0.5 * (1 + math.cos(math.pi * fall))


def loss_weights(length: int) -> list[float]:
    """Loss weight of each class of token."""
    weights = [0.0] * 4
    weights[TEXT] = 0.05 if length <= 1024 else 0.02
    weights[SENTENCE] = 0.2
    weights[REPEAT] = 0.5
    weights[ANSWER] = 1.0
    return weights


def make_optimizer(model: PreTrainedModel, options: Options) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=options.peak, betas=(0.9, 0.95), fused=fused)


def exact_answers(batch: Batch, right: np.ndarray) -> dict[str, tuple[int, int]]:
    """Per task: answers whose every token is predicted, and answers in all."""
    target_class = np.roll(batch.classes, -1, axis=1)
    target_class[:, -1] = TEXT
    answer = (target_class == ANSWER).reshape(-1)
    start = answer & ~np.concatenate([[False], answer[:-1]])
    number = np.cumsum(start) - 1
    wrong = np.bincount(number[answer], weights=~right[answer], minlength=int(start.sum()))
    task = np.repeat(batch.tasks, batch.tokens.shape[1])[start]
    counts = {}
    for index, name in enumerate(TASKS):
        if (task == index).any():
            counts[name] = (int((wrong[task == index] == 0).sum()), int((task == index).sum()))
    return counts


class Trainer:
    """State of a run: model, optimizer, clock."""

    def __init__(self, options: Options, device: str) -> None:
        self.options, self.device = options, device
        config = make_config(options.architecture, options.layers)
        # Any: a PreTrainedModel has no types that say what it is made of.
        self.model: Any = make_model(config, options.seed).to(device)
        self.optimizer = make_optimizer(self.model, options)
        on_gpu = device == "cuda"
        self.forward = Forward(self.model, torch.bfloat16 if on_gpu else torch.float32, on_gpu)
        self.step, self.tokens, self.elapsed = 0, 0, 0.0

    def start_from(self, folder: Path) -> None:
        """Take over the weights of a model folder; the optimizer starts afresh."""
        trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.load_state_dict(trained.state_dict())

    def load(self, path: Path) -> None:
        """Continue from a saved state."""
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.elapsed = state["elapsed"]

    def save(self, path: Path) -> None:
        """Save everything that ``load`` needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "elapsed": self.elapsed,
        }
        torch.save(state, path)

    def _micro(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        def move(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            if self.device == "cuda":
                tensor = tensor.pin_memory().to("cuda", non_blocking=True)
            return tensor

        tokens, classes = move(batch.tokens).long(), move(batch.classes).long()
        classes = classes.roll(-1, 1)
        classes[:, -1] = TEXT
        table = torch.tensor(loss_weights(tokens.shape[1]), device=self.device)
        weights = table[classes]
        weights[:, -1] = 0.0
        losses, right = self.forward(tokens, move(batch.positions), tokens.roll(-1, 1))
        weights = weights.reshape(-1)
        loss = (losses * weights).sum() / weights.sum()
        (loss * self.options.world / self.options.accumulate).backward()
        return losses.detach(), right, classes.reshape(-1)

    def run(self) -> None:
        """Train until the time is up."""
        options = self.options
        total = 60 * options.minutes
        stop = total if options.stop_after is None else 60 * options.stop_after
        stop = min(total, self.elapsed + stop)
        length = stage_length(options.stages, self.elapsed / total)
        feed = Feed(
            options.data,
            options.micro_batch,
            options.workers,
            1000 * self.step + 77 * options.seed + options.rank * options.workers,
            length,
        )
        start = time.monotonic() - self.elapsed
        shown, shown_tokens = self.elapsed, self.tokens
        try:
            while self.elapsed < stop:
                progress = self.elapsed / total
                feed.set_length(stage_length(options.stages, progress))
                rate = learning_rate(options, self.step, progress)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                for _ in range(options.accumulate // options.world):
                    batch = feed.next()
                    losses, right, classes = self._micro(batch)
                elapsed = ranks.average(self.model.parameters(), time.monotonic() - start)
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                self.tokens += options.micro_batch * options.accumulate
                if self.step % options.log_every == 0 and options.rank == 0:
                    speed = (self.tokens - shown_tokens) / (time.monotonic() - start - shown)
                    print(f"{speed / 1e6:.2f}M tokens/s queue {feed.waiting}", end=" ")
                    self._log(batch, losses, right, classes, float(norm), rate)
                    shown, shown_tokens = time.monotonic() - start, self.tokens
                elif self.device == "cuda" and self.step % 2 == 0:
                    torch.cuda.synchronize()
                self.elapsed = elapsed
        finally:
            feed.close()

    def _log(
        self,
        batch: Batch,
        losses: Tensor,
        right: Tensor,
        classes: Tensor,
        norm: float,
        rate: float,
    ) -> None:
        means = []
        for index in (TEXT, SENTENCE, REPEAT, ANSWER):
            chosen = losses[classes == index]
            means.append(f"{chosen.mean().item():.3f}" if chosen.numel() else "-")
        exact = exact_answers(batch, right.cpu().numpy())
        parts = " ".join(f"{name} {good}/{of}" for name, (good, of) in exact.items())
        print(
            f"{self.step:5d} {self.elapsed:5.0f}s {self.tokens / 1e6:6.0f}M"
            f" len {batch.tokens.shape[1]} lr {rate:.1e} norm {norm:.2f}"
            f" loss text/sentence/repeat/answer {'/'.join(means)} exact {parts}",
            flush=True,
        )
