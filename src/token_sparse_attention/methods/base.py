"""What a method is: how the queries of a layer's sparse sequences attend.

A method is one class and one config. `prefill.prefill` calls its functions in this order:
`gate`, `prepare`, `attend`. Defining a subclass registers it:
``class Mine(Method[MyConfig], config=MyConfig)``.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from token_sparse_attention.attention.backend import Backend
from token_sparse_attention.config import SparseConfig
from token_sparse_attention.gate import DenseReason, Gate
from token_sparse_attention.inputs import Problem
from token_sparse_attention.results import Attended, TokenSelection

C = TypeVar("C", bound=SparseConfig)
_METHODS: dict[type[SparseConfig], type[Method[Any]]] = {}


class Plan(NamedTuple):
    """What a method decided before it attends.

    Attributes:
        ran_sparse: ``[B]`` bool, which sequences run sparse; the others are attended densely.
            None if all do.
        keys: whatever the method's `attend` needs.
        begin: the slot of the first query that attends sparsely; the queries before attend to
            all keys. Where `begins` is given, no sequence begins later.
        begins: ``[B]`` int32, each sequence's own, its end where it does not run sparse; None if
            all begin at `begin`.
    """

    ran_sparse: Tensor | None
    keys: Any
    begin: int = 0
    begins: Tensor | None = None


class LayerShape(NamedTuple):
    """The sizes of one call of a layer, for `Method.workspace`.

    Attributes:
        num_heads: H.
        num_kv_heads: H_kv.
        head_dim: D.
        itemsize: bytes of a number.
        query_len: S_q.
        kv_len: S_kv.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    query_len: int
    kv_len: int


class Method(ABC, Generic[C]):
    """One method with its settings.

    Args:
        config: the settings.

    Attributes:
        config: the settings.
    """

    def __init__(self, config: C) -> None:
        self.config = config

    def __init_subclass__(cls, config: type[SparseConfig], **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _METHODS[config] = cls

    def gate(self, device: torch.device, num_heads: int, head_dim: int) -> Gate:
        """Return which lengths of a layer run sparse.

        Args:
            device: where it attends.
            num_heads: its query heads there, H.
            head_dim: D.
        """
        del device, num_heads, head_dim
        return Gate()

    @abstractmethod
    def prepare(self, problem: Problem, gate: Gate) -> Plan | DenseReason:
        """Decide which sequences and queries run sparse.

        Args:
            problem: the inputs.
            gate: what `gate` returned.

        Returns:
            The plan; or why every sequence runs dense after all.
        """

    @abstractmethod
    def attend(
        self, plan: Plan, problem: Problem, backend: Backend, into: Attended
    ) -> TokenSelection | None:
        """Write the output of the sparse sequences.

        Every real query of a sparse sequence must be written, from ``plan.begin`` on. The
        caller then writes the queries before, dense sequences, the last ``dense_queries`` and
        the ``dense_heads``.

        Args:
            plan: what `prepare` returned.
            problem: the inputs.
            backend: what attends.
            into: output and log-sum-exp to write.

        Returns:
            What each head attends to, where the problem's `aux` asks for it, else None. Its
            `reasons` say why a sequence that passed the gate ran dense all the same.
        """

    @abstractmethod
    def work(self, chosen: int, prompt_tokens: int) -> float:
        """Return how many pairs of query and key a head attends to, as a share of all causal ones.

        Args:
            chosen: how many tokens the method chose for the head: its `TokenSelection.lengths`.
            prompt_tokens: S.
        """

    def workspace(self, shape: LayerShape) -> int:
        """Return about how many bytes `prepare` and `attend` hold at most.

        Args:
            shape: of the layer's call.
        """
        return 12 * shape.num_heads * shape.kv_len


@functools.lru_cache(maxsize=1024)
def method_of(config: SparseConfig) -> Method[Any]:
    """Return the method that a config is for.

    Raises:
        TypeError: if no method is registered for the config's class.
    """
    method = _METHODS.get(type(config))
    if method is None:
        raise TypeError(f"config must be one that a Method is registered for, got {config!r}")
    return method(config)
