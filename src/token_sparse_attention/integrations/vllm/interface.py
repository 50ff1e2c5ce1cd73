"""What the plugin takes for granted about vLLM's Python interface, checked before it is used.

vLLM's sources are read, not imported: an import of a backend chooses its kernels, which is too
early in some of vLLM's processes. An import of the plugin that is gone fails by itself.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_BUILDER = ("kv_cache_spec", "layer_names", "vllm_config", "device")
_BUILD = ("common_prefix_len", "common_attn_metadata", "fast_build")
_FORWARD = (
    *("layer", "query", "key", "value", "kv_cache", "attn_metadata"),
    *("output", "output_scale", "output_block_scale"),
)
_IMPL = (
    *("num_heads", "head_size", "scale", "num_kv_heads", "alibi_slopes", "sliding_window"),
    *("kv_cache_dtype", "logits_soft_cap", "attn_type", "kv_sharing_target_layer_name", "sinks"),
)
_NEEDED_FIELDS = (
    *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens"),
    *("max_query_len", "block_table_tensor", "slot_mapping", "causal", "positions"),
    *("is_prefilling", "seq_lens_cpu_upper_bound"),
    *("_num_computed_tokens_cache", "_token_to_req_indices_cache"),
)
# A step is split by its requests; what else has a number per request has to be split as well.
_KNOWN_FIELDS = frozenset(
    {
        *_NEEDED_FIELDS,
        *("max_seq_len", "logits_indices_padded", "num_logits_indices", "max_logits_per_req"),
        *("encoder_seq_lens", "encoder_seq_lens_cpu", "dcp_local_seq_lens", "req_idx"),
        *("dcp_local_seq_lens_cpu", "dcp_local_seq_lens_cpu_upper_bound", "mm_req_doc_ranges"),
        *("rswa_prefix_lens", "replayssm_decode_base_cpu", "_seq_lens_cpu"),
        "_num_computed_tokens_cpu",
    }
)
# What the stock backends say of themselves, which the plugin's say too unless they deny it.
_KNOWN_FLAGS = frozenset(
    {
        *("accept_output_buffer", "forward_includes_kv_cache_update", "supported_dtypes"),
        *("supported_kv_cache_dtypes", "supports_kv_cache_update_bypass", "head_size_v"),
    }
)


class _Backend(NamedTuple):
    """Where vLLM has a device's stock backend.

    Attributes:
        module: its file below vLLM's folder.
        prefix: what its classes' names begin with.
        impl: the class that attends.
    """

    module: str
    prefix: str
    impl: str


_BACKENDS = {
    "cpu": _Backend(
        "v1/attention/backends/cpu_attn.py", "CPUAttention", "CPUAttentionBackendImpl"
    ),
    "cuda": _Backend(
        "v1/attention/backends/flash_attn.py", "FlashAttention", "FlashAttentionImpl"
    ),
}


def check_interface(device: str) -> None:
    """Check that the vLLM that is installed has the interface that the plugin knows.

    Args:
        device: ``"cpu"`` or ``"cuda"``, which stock backend the plugin builds on.

    Raises:
        RuntimeError: if it has another one.
    """
    spec = importlib.util.find_spec("vllm")
    places = [] if spec is None else spec.submodule_search_locations or []
    difference = next(_differences(Path(next(iter(places), "vllm")), _BACKENDS[device]), None)
    if difference is not None:
        raise RuntimeError(
            f"token sparse attention does not know this vLLM: {difference}; install a version "
            "that docs/supported.md names, or leave token sparse attention off"
        )


def _differences(folder: Path, backend: _Backend) -> Iterator[str]:
    classes: dict[str, ast.ClassDef] = {}
    for path in ("v1/attention/backend.py", backend.module):
        try:
            tree = ast.parse((folder / path).read_bytes())
        except (OSError, SyntaxError) as error:
            yield f"{path} cannot be read ({type(error).__name__})"
            return
        classes.update({node.name: node for node in tree.body if isinstance(node, ast.ClassDef)})
    functions = {
        (backend.impl, "__init__"): _IMPL,
        (backend.impl, "forward"): _FORWARD,
        (f"{backend.prefix}MetadataBuilder", "build"): _BUILD,
        ("AttentionMetadataBuilder", "__init__"): _BUILDER,
    }
    for (name, function), expected in functions.items():
        taken = _parameters(classes, name, function)
        if taken is None:
            yield f"it has no {name}.{function}"
        elif taken != expected:
            yield f"{name}.{function} takes {', '.join(taken)}, not {', '.join(expected)}"
    fields = _attributes(classes, "CommonAttentionMetadata")
    for name in sorted(set(_NEEDED_FIELDS) - fields):
        yield f"CommonAttentionMetadata has no {name}"
    for name in sorted(fields - _KNOWN_FIELDS):
        yield f"CommonAttentionMetadata has {name}"
    for owner in ("AttentionBackend", f"{backend.prefix}Backend"):
        for name in sorted(_attributes(classes, owner) - _KNOWN_FLAGS):
            yield f"{owner} has {name}"


def _parameters(
    classes: dict[str, ast.ClassDef], name: str, function: str
) -> tuple[str, ...] | None:
    """Return what a class's function takes after `self`, None if there is none."""
    for node in classes[name].body if name in classes else []:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            return tuple(one.arg for one in given[1:])
    return None


def _attributes(classes: dict[str, ast.ClassDef], name: str) -> set[str]:
    """Return the names that a class's body gives values or types to."""
    names: set[str] = set()
    for node in classes[name].body if name in classes else []:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names
