"""What `tsa bench` measures; apart, so that the commands' help needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

from token_sparse_attention.benchmark.runs import MAIN_KEPT
from token_sparse_attention.config import TokenSelectionConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.options import Count, Device, Option, Tokens

if TYPE_CHECKING:
    import torch

Lengths = tuple[Tokens, ...]
Optional = Annotated[Lengths, Option(optional=True)]
Shares = Annotated[tuple[float, ...], Option(optional=True)]
Seconds = Annotated[float, Option(metavar="S", minimum=0)]


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """What all measurements share.

    Attributes:
        device: torch device
        dtype: of the inputs
        num_heads: query heads
        num_kv_heads: KV heads
        budget_seconds: seconds to spend on each time, as far as a few samples allow
    """

    device: Device = "auto"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    num_heads: Annotated[Count, Option("--heads", metavar="H")] = 32
    num_kv_heads: Annotated[Count, Option("--kv-heads", metavar="H")] = 8
    budget_seconds: Seconds = 0.2

    @cached_property
    def torch_device(self) -> torch.device:
        """The device, which works.

        Raises:
            UsageError: if it does not.
        """
        from token_sparse_attention.benchmark.measuring import device_named

        return device_named(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch's."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True, kw_only=True)
class OpOptions(MeasuringOptions):
    """What `tsa bench op` measures.

    Attributes:
        lengths: prompt lengths in tokens; the longest default ones take a GPU
        crossover_lengths: lengths at which the method decides, with crossover on; the same
        kept: shares of the tokens to keep
        drop_mass: settings at the crossover lengths
        head_dim: head size
        backends: dense kernels, the first being the one to compare with
        peers_up_to: longest prompt for slow peers: flash, flex, eager

    Raises:
        UsageError: if a field is out of range.
    """

    lengths: Optional = tuple(2**power for power in range(12, 19))
    crossover_lengths: Optional = tuple(2**power for power in range(10, 19))
    kept: Shares = (1.0, 0.9, 0.65, 0.5, 0.35, 0.2)
    drop_mass: Shares = (0.005, 0.1, 0.3, 0.5)
    head_dim: Annotated[Count, Option(metavar="D")] = 128
    backends: Annotated[
        tuple[str, ...] | None,
        Option(metavar="NAMES", default="fa4,cudnn,flash,flex; off CUDA flash,math"),
    ] = None
    peers_up_to: Annotated[Count, Option(metavar="S")] = 2**17

    def __post_init__(self) -> None:
        from token_sparse_attention.benchmark.contenders import DENSE

        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"--heads must be a multiple of --kv-heads {self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        unknown = [name for name in self.backends or () if name not in DENSE]
        if unknown:
            raise UsageError(f"--backends must be among {', '.join(DENSE)}; got {unknown[0]!r}")
        longest_dense = TokenSelectionConfig().observation_window
        shortest = min((*self.lengths, *self.crossover_lengths), default=0)
        if shortest <= longest_dense:
            raise UsageError(f"lengths must exceed {longest_dense}, got {shortest}")
        if not all(0 < kept <= 1 for kept in self.kept) or not self.kept:
            raise UsageError(f"--kept must hold shares in (0, 1], got {self.kept}")
        if not all(0 < mass < 1 for mass in self.drop_mass):
            raise UsageError(f"--drop-mass must hold shares in (0, 1), got {self.drop_mass}")

    @property
    def dense(self) -> tuple[str, ...]:
        """The dense kernels to measure."""
        if self.backends is not None:
            return self.backends
        on_cuda = self.torch_device.type == "cuda"
        return ("fa4", "cudnn", "flash", "flex") if on_cuda else ("flash", "math")

    @property
    def main_kept(self) -> float:
        """The share to measure where only one is."""
        return MAIN_KEPT if MAIN_KEPT in self.kept else self.kept[0]


@dataclass(frozen=True, kw_only=True)
class PrefillOptions(MeasuringOptions):
    """What `tsa bench prefill` measures; by default a model of Llama-3.1-8B's shape.

    Attributes:
        lengths: prompt lengths in tokens; the longest default ones take a GPU
        kept: shares of the tokens to keep by token selection
        samples: numbers of samples of KV sampling, the other settings being the defaults
        num_layers: layers of the model
        hidden_size: hidden size of the model
        intermediate_size: hidden size of the model's feed-forward part
        vocab_size: tokens of the model's vocabulary

    Raises:
        UsageError: if a field is out of range.
    """

    lengths: Lengths = tuple(2**power for power in range(13, 19))
    kept: Shares = (0.5, 0.35)
    samples: Optional = (4096,)
    num_layers: Annotated[Count, Option("--layers")] = 32
    hidden_size: Annotated[Count, Option("--hidden")] = 4096
    intermediate_size: Annotated[Count, Option("--intermediate")] = 14336
    vocab_size: Annotated[Count, Option("--vocab")] = 128256
    budget_seconds: Seconds = 5.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise UsageError(
                "--hidden must be a multiple of --heads, and that of --kv-heads; got "
                f"{self.hidden_size}, {self.num_heads} and {self.num_kv_heads}"
            )
        shortest = TokenSelectionConfig().observation_window
        if not self.lengths or min(self.lengths) <= shortest:
            raise UsageError(f"--lengths must exceed {shortest}, got {self.lengths}")
        if not all(0 < kept <= 1 for kept in self.kept):
            raise UsageError(f"--kept must hold shares in (0, 1], got {self.kept}")
