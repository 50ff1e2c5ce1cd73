"""The entry point in vLLM's group ``vllm.general_plugins``."""

from __future__ import annotations

from token_sparse_attention.integrations.vllm.interface import check_interface

_PACKAGE = "token_sparse_attention.integrations.vllm"


def register() -> None:
    """Make this library's backends known to vLLM, in each of its processes.

    On a GPU, ``--attention-backend CUSTOM`` chooses the backend. On a CPU vLLM always takes
    ``CPU_ATTN``, so the backend stands under that name there, and does what the stock one
    does unless ``additional_config`` has settings for it.

    Raises:
        RuntimeError: if this vLLM has another interface than the plugin knows.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    check_interface("cpu" if current_platform.is_cpu() else "cuda")
    if current_platform.is_cpu():
        path = f"{_PACKAGE}.cpu.CPUTokenSparseBackend"
        register_backend(AttentionBackendEnum.CPU_ATTN, path)
    else:
        path = f"{_PACKAGE}.cuda.FlashTokenSparseBackend"
    register_backend(AttentionBackendEnum.CUSTOM, path)
