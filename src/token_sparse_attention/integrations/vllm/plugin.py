"""The entry point in vLLM's group ``vllm.general_plugins``, and the backends that it names."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Mapping
from typing import Any

from token_sparse_attention.integrations.serving.settings import KEY
from token_sparse_attention.integrations.vllm.interface import check_interface

_LOG = logging.getLogger("vllm.token_sparse_attention")  # below vLLM's own logger
_CPU, _GPU = "CPUTokenSparseBackend", "FlashTokenSparseBackend"
_MODULES = {_CPU: "cpu", _GPU: "cuda"}


def register() -> None:
    """Make this library's backends known to vLLM, in each of its processes.

    On a GPU, ``--attention-backend CUSTOM`` chooses the backend. On a CPU vLLM always takes
    ``CPU_ATTN``, so the backend stands under that name there, and does what the stock one
    does unless ``additional_config`` has settings for it.

    vLLM calls this wherever the plugin is installed, whether or not anybody asked for sparse
    attention. So nothing here stops vLLM; a backend is checked when vLLM chooses it.
    """
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        _LOG.warning("Token sparse attention is off: it does not know this vLLM: %s", error)
        return
    name = _CPU if current_platform.is_cpu() else _GPU
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{name}")
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{name}")


def __getattr__(name: str) -> Any:
    """Return a backend, which vLLM asks for by its path when it chooses one.

    Raises:
        RuntimeError: if this vLLM has another interface than the plugin knows, and sparse
            attention was asked for.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        check_interface(_MODULES[name])
    except RuntimeError:
        if name == _GPU or _is_on():
            raise
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        return pkgutil.resolve_name(AttentionBackendEnum.CPU_ATTN.value)
    module = importlib.import_module(f"{__package__}.{_MODULES[name]}")
    return getattr(module, name)


def _is_on() -> bool:
    """Return whether the engine that is starting has settings for sparse attention."""
    from vllm.config import get_current_vllm_config

    option = get_current_vllm_config().additional_config
    return isinstance(option, Mapping) and KEY in option
