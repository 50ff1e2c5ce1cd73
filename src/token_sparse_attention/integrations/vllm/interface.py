"""What the plugin takes for granted about vLLM's Python interface, checked when vLLM loads it.

vLLM's sources are read, not imported: an import of a backend chooses its kernels, which is too
early in some of vLLM's processes. What the plugin imports besides fails by itself if it is gone.
"""

from __future__ import annotations

import ast
import importlib.util
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


class _UnknownError(Exception):
    """The interface is not the one that the plugin knows."""


def check_interface(device: str) -> None:
    """Check that the vLLM that is installed has the interface that the plugin knows.

    Args:
        device: ``"cpu"`` or ``"cuda"``, which stock backend the plugin builds on.

    Raises:
        RuntimeError: if it has another one.
    """
    spec = importlib.util.find_spec("vllm")
    places = [] if spec is None else spec.submodule_search_locations or []
    try:
        _check(Path(next(iter(places), "vllm")), _BACKENDS[device])
    except _UnknownError as error:
        raise RuntimeError(
            f"token sparse attention does not know this vLLM: {error}; install a version that "
            "docs/vllm.md names, or leave the plugin out with VLLM_PLUGINS"
        ) from None


def _check(folder: Path, backend: _Backend) -> None:
    shared = _Module(folder, "v1/attention/backend.py")
    own = _Module(folder, backend.module)
    builder = f"{backend.prefix}MetadataBuilder"
    own.expect_parameters(own.function(backend.impl, "__init__"), _IMPL)
    own.expect_parameters(own.function(backend.impl, "forward"), _FORWARD)
    own.expect_parameters(own.function(builder, "build"), _BUILD)
    shared.expect_parameters(shared.function("AttentionMetadataBuilder", "__init__"), _BUILDER)
    metadata = shared.find("CommonAttentionMetadata")
    fields = _attributes(metadata)
    for name in _NEEDED_FIELDS:
        if name not in fields:
            raise _UnknownError(f"CommonAttentionMetadata has no field {name}")
    for name in sorted(fields - _KNOWN_FIELDS):
        raise _UnknownError(f"CommonAttentionMetadata has a field {name}")
    flags = _attributes(shared.find("AttentionBackend"))
    flags |= _attributes(own.find(f"{backend.prefix}Backend"))
    for name in sorted(flags - _KNOWN_FLAGS):
        raise _UnknownError(f"{backend.prefix}Backend has an attribute {name}")


class _Module:
    """One of vLLM's source files."""

    def __init__(self, folder: Path, path: str) -> None:
        self._name = "vllm." + path.removesuffix(".py").replace("/", ".")
        try:
            self._tree = ast.parse((folder / path).read_bytes())
        except (OSError, SyntaxError) as error:
            raise _UnknownError(f"{self._name} cannot be read ({type(error).__name__})") from error

    def find(self, name: str) -> ast.ClassDef:
        """Return a class."""
        for node in self._tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node
        raise _UnknownError(f"{self._name} has no class {name}")

    def function(self, name: str, function: str) -> ast.FunctionDef:
        """Return a class's function."""
        for node in self.find(name).body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                return node
        raise _UnknownError(f"{name} has no function {function}")

    def expect_parameters(self, function: ast.FunctionDef, expected: tuple[str, ...]) -> None:
        """Check what a function takes after `self`."""
        given = function.args
        taken = tuple(one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)[1:])
        known = taken in (expected, expected[:-1] if expected is _IMPL else expected)
        if not known:
            raise _UnknownError(
                f"{function.name} of {self._name} takes {', '.join(taken)}, "
                f"expected {', '.join(expected)}"
            )


def _attributes(definition: ast.ClassDef) -> set[str]:
    """Return the names that a class's body gives values or types to."""
    names: set[str] = set()
    for node in definition.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names
