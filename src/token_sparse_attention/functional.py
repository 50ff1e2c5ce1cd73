"""The operator: sparse causal attention of a prompt's queries, as one function."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from token_sparse_attention.config import SparseConfig
from token_sparse_attention.custom_op import call_operator
from token_sparse_attention.execution import Execution
from token_sparse_attention.inputs import (
    AuxRequest,
    Chunk,
    check_attention_inputs,
    check_chunk,
    check_config,
    check_dense_heads,
    check_no_gradients,
    resolve_scale,
)
from token_sparse_attention.prefill import prefill
from token_sparse_attention.results import SparseOutput

_prefill_untraced = torch.compiler.disable(prefill)  # type: ignore[no-untyped-call]
_AUTO = Execution()
_WHOLE = Chunk()


@overload
def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, config: SparseConfig, *,
    padding_mask: Tensor | None = ..., scale: float | None = ..., execution: Execution = ...,
    chunk: Chunk = ..., return_aux: None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def token_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, config: SparseConfig, *,
    padding_mask: Tensor | None = ..., scale: float | None = ..., execution: Execution = ...,
    chunk: Chunk = ..., return_aux: AuxRequest,
) -> SparseOutput: ...  # fmt: skip


def token_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: SparseConfig,
    *,
    padding_mask: Tensor | None = None,
    scale: float | None = None,
    execution: Execution = _AUTO,
    chunk: Chunk = _WHOLE,
    return_aux: AuxRequest | None = None,
) -> Tensor | SparseOutput:
    r"""Sparse causal attention for prefill; the result has no gradient.

    The config's class is the method: `KVSamplingConfig` keeps every query and samples keys,
    `TokenSelectionConfig` drops queries, keys and values as the paper does.

    On CUDA the call does not wait for the device, so a CUDA graph can capture it. There are two
    exceptions: attention backends that read lengths on the host (cudnn, efficient, math,
    patterns), and plain PyTorch (``impl="reference"``, float64, head sizes above 256).
    `torch.compile` takes the call as one operator.

    Args:
        query: ``[B, H, S_q, D]``, floating, after position encoding. Queries occupy the
            slots ``[S_kv - S_q, S_kv)``.
        key: ``[B, H_kv, S_kv, D]``, H a multiple of H_kv (GQA).
        value: ``[B, H_kv, S_kv, D]``.
        config: the settings; its ``sparse_layers`` is not read here.
        padding_mask: ``[B, S_kv]`` bool, True for real tokens, one contiguous run per sequence.
            Every length and window counts real tokens, so a sequence of a batch gives what it
            gives alone. The output of padding is zero. A sequence whose mask is not one run
            raises, or gives NaN where the check would wait for the device.
        scale: factor of the logits, ``1 / sqrt(D)`` if None.
        execution: which code and kernels run, how much at once, and on how many ranks.
        chunk: what part of its prompts the call holds: the probes of earlier calls, and whether
            the prompts end here.
        return_aux: what to return with the output, see `AuxRequest`.

    Returns:
        The output ``[B, H, S_q, D]`` in query's dtype; with `return_aux` a `SparseOutput`. Its
        memory layout is query's, unless all sequences run dense.

    Raises:
        TypeError: if an argument has the wrong type or dtype.
        ValueError: if shapes, devices, names or the mask do not fit, if an input requires a
            gradient while gradients are recorded, or if the backend cannot run the input.

    Source:
        arXiv 2602.03216 for token selection. KV sampling, ``S_q < S_kv`` and the crossover are
        extensions.

    Example:
        >>> query = torch.randn(1, 8, 500, 32)
        >>> key, value = torch.randn(2, 1, 2, 500, 32)
        >>> config = KVSamplingConfig(
        ...     block_size=64, num_probes=16, sliding_window=64, num_samples=100, crossover="off"
        ... )
        >>> aux = AuxRequest(selection=True)
        >>> out, selection, _ = token_sparse_attention(query, key, value, config, return_aux=aux)
        >>> out.shape, selection.ran_sparse, selection.lengths[0, 0]
        (torch.Size([1, 8, 500, 32]), tensor([True]), tensor(104))
    """
    check_config(config)
    if not isinstance(execution, Execution):
        raise TypeError(f"execution must be an Execution, got {type(execution).__name__}")
    aux = AuxRequest() if return_aux is None else return_aux
    if not isinstance(aux, AuxRequest):
        raise TypeError(f"return_aux must be an AuxRequest or None, got {type(aux).__name__}")
    check_attention_inputs(query, key, value)
    check_no_gradients(query=query, key=key, value=value)
    check_chunk(chunk, query)
    check_dense_heads(config, execution.num_ranks * query.shape[1])
    scale = resolve_scale(scale, query.shape[-1])
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    opaque = torch.compiler.is_compiling() or traced or query.is_meta
    if opaque and execution.tp_group is None:
        settings = (config.text, execution.text, scale, aux)
        result = call_operator((query, key, value), padding_mask, *settings, chunk)
    else:
        run = prefill if execution.tp_group is None else _prefill_untraced
        with torch.no_grad():
            tensors = (query, key, value)
            result = run(tensors, padding_mask, config, execution, scale, aux, chunk)
    return result.output if return_aux is None else result
