"""How one call of the operator runs: which code, how much at once, on how many ranks."""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from token_sparse_attention.attention.names import parse_backend
from token_sparse_attention.attention.patterns.base import PatternConfig
from token_sparse_attention.config import check_int
from token_sparse_attention.impls import check_impl
from token_sparse_attention.tensor_parallel import resolve_tp_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Execution:
    """Which code runs the operator, how much of it at once, and on how many ranks.

    Args:
        impl: which code scores, chooses and moves tokens: ``"auto"``, ``"triton"`` or
            ``"reference"``.
        attention_backend: which kernel attends: ``"auto"``, ``"fa4"`` (flash-attn-4, and
            FlashAttention-2 for the last queries of few heads), ``"flash"``
            (FlashAttention-2), ``"cudnn"``, ``"efficient"`` or ``"math"``; an explicit choice
            runs or raises. Or a block-sparse pattern, which then runs in place of dense causal
            attention, in sequences that run dense as well: ``"flexprefill"``, ``"minference"``,
            ``"xattention"``, ``"streaming"``, or settings such as
            ``FlexPrefillConfig(gamma=0.9)``; see `parse_backend`. Kept as its text.
        head_chunk: how many heads of the batch token selection compresses and attends at once,
            which bounds memory; as many as fit half a GiB if None.
        tp_group: the ranks that hold the other query heads of the same layer, where tensor
            parallelism splits them; every rank has equally many and calls with the same
            shapes, mask and settings. The ranks then decide as one process with all heads
            would. A compiler does not look into such a call.

    Raises:
        TypeError: if a field has the wrong type.
        ValueError: if a name is unknown or a number out of range.

    Example:
        >>> Execution(attention_backend="xattention").attention_backend
        'xattention'
    """

    impl: str = "auto"
    attention_backend: str | PatternConfig = "auto"
    _: KW_ONLY
    head_chunk: int | None = None
    tp_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        check_impl(self.impl)
        object.__setattr__(self, "attention_backend", parse_backend(self.attention_backend))
        if self.head_chunk is not None:
            check_int("head_chunk", self.head_chunk, 1)
        object.__setattr__(self, "tp_group", resolve_tp_group(self.tp_group))
        # Made here, and without the JSON encoder, because a compiler cannot trace that.
        chunk = "-" if self.head_chunk is None else str(self.head_chunk)
        object.__setattr__(self, "_text", f"{self.impl} {chunk} {self.attention_backend}")

    @property
    def backend(self) -> str:
        """The attention backend as text."""
        return str(self.attention_backend)

    @property
    def text(self) -> str:
        """All but the group as one line, in which it travels through PyTorch's operator."""
        text: str = self.__dict__["_text"]
        return text

    @property
    def num_ranks(self) -> int:
        """How many ranks share the layer's heads."""
        return 1 if self.tp_group is None else self.tp_group.size()


@functools.lru_cache(maxsize=256)
def execution_of(text: str) -> Execution:
    """Return the execution that `Execution.text` stands for."""
    impl, chunk, backend = text.split(" ", 2)
    return Execution(impl, backend, head_chunk=None if chunk == "-" else int(chunk))
