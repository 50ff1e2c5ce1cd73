"""What the plugin asks of vLLM: its configuration, its ranks, its layers, its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from token_sparse_attention.config import SparseConfig
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.integrations.serving.layer import Layer, own_part
from token_sparse_attention.integrations.serving.plan import Prefill
from token_sparse_attention.integrations.serving.settings import (
    KEY,
    Settings,
    read_settings,
    selects_tokens,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def engine_settings(vllm_config: Any) -> Settings | None:
    """Return the plugin's settings in an engine's configuration, None if it is off.

    Raises:
        TypeError: if a setting has the wrong type.
        ValueError: if a setting is bad, or the engine's configuration does not go with it.
    """
    if is_draft(vllm_config):
        return None
    settings = read_settings(vllm_config.additional_config)
    if settings is None:
        backend = getattr(vllm_config.attention_config.backend, "name", None)
        if backend == "CUSTOM":
            raise ValueError(
                "attention_backend CUSTOM is token sparse attention, which needs "
                f"additional_config[{KEY!r}] with a 'profile' or a 'config'"
            )
        return None
    configs = settings.layer_configs(vllm_config.model_config.get_total_num_hidden_layers())
    refuses = settings.prefix_caching == "refuse" and selects_tokens(configs.values())
    if vllm_config.cache_config.enable_prefix_caching and refuses:
        raise ValueError(
            "token selection does not start while prefix caching is on, because a cached "
            "prefix holds what an earlier prompt's selection made of it; start vLLM "
            "with --no-enable-prefix-caching (enable_prefix_caching=False), or set "
            f"additional_config[{KEY!r}]['prefix_caching'] to 'allow'"
        )
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    if transfer is not None and refuses:
        raise ValueError(
            "token selection does not start with a kv_transfer_config, got "
            f"{getattr(transfer, 'kv_connector', None)!r}: a connector can give a request the "
            "prefix that another one computed; start without it, or set "
            f"additional_config[{KEY!r}]['prefix_caching'] to 'allow'"
        )
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise ValueError(f"token sparse attention needs {name} 1, got {size}")
    return settings


def is_draft(vllm_config: Any) -> bool:
    """Return whether a configuration is that of a draft model, which stays dense."""
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    return draft is not None and draft is vllm_config.model_config


def most_decode_tokens(vllm_config: Any) -> int:
    """Return how many tokens a request has in a decode step at most: more with speculation."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return 1 + (getattr(speculative, "num_speculative_tokens", None) or 0)


def is_quantised(kv_cache_dtype: str) -> bool:
    """Return whether a cache of this type holds numbers with scales."""
    try:
        from vllm.v1.kv_cache_interface import is_quantized_kv_cache
    except ImportError:  # up to vLLM 0.32
        from vllm.utils.torch_utils import is_quantized_kv_cache

    return bool(is_quantized_kv_cache(kv_cache_dtype))


def tensor_parallel_group() -> tuple[ProcessGroup | None, int]:
    """Return the group of tensor-parallel ranks, None if there is one rank; and this rank."""
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return (group.device_group if group.world_size > 1 else None), group.rank_in_group


def usable_layers(
    settings: Settings, vllm_config: Any
) -> tuple[dict[str, SparseConfig], dict[str, str]]:
    """Return the config of each layer that can run sparse, and why others cannot, by name."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    by_number = settings.layer_configs(vllm_config.model_config.get_total_num_hidden_layers())
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    configs, obstacles = {}, {}
    for name in sorted(layers, key=layer_number):
        if name.startswith("draft_model."):
            continue
        number = layer_number(name)
        config, impl = by_number.get(number), layers[name].impl
        if number < 0 and by_number:
            obstacles[name] = "the name does not say which layer it is"
        elif config is None:
            continue
        elif not hasattr(impl, "obstacle"):
            obstacles[name] = f"attention is {type(impl).__name__}'s"
        elif impl.obstacle is not None:
            obstacles[name] = impl.obstacle
        else:
            configs[name] = config
    return configs, obstacles


def layer_shapes(
    configs: dict[str, SparseConfig], vllm_config: Any, tp_group: ProcessGroup | None
) -> list[Layer]:
    """Return what the kernels of some layers are compiled for, given their configs by name.

    Args:
        configs: of the layers, by their names.
        vllm_config: of the engine.
        tp_group: the ranks that hold the layers' other heads, None without them.

    Raises:
        ValueError: if a layer has no such dense heads.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    layers = get_layers_from_vllm_config(vllm_config, Attention)
    dtype = vllm_config.model_config.dtype
    shapes = []
    for name, config in configs.items():
        impl = layers[name].impl
        sizes = (impl.num_heads, impl.num_kv_heads, impl.head_size)
        shapes.append(own_part(Layer(config, *sizes, dtype, impl.scale), tp_group))
    return shapes


def longest_prefill(vllm_config: Any) -> Prefill:
    """Return a request with as many queries and keys as the engine takes."""
    kv_len = vllm_config.model_config.max_model_len
    return Prefill(0, 0, min(vllm_config.scheduler_config.max_num_batched_tokens, kv_len), kv_len)


def layer_number(name: str) -> int:
    """Return the number in a layer's name such as ``model.layers.3.self_attn.attn``.

    A name without a number, or with several, gives -1: it does not say which layer it is.
    """
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else -1


def step_obstacle(common: Any) -> str | None:
    """Return why no request of a step can run sparse, None if some may."""
    if common.causal is not True:
        return str(DenseReason.NOT_CAUSAL)
    for name in ("mm_req_doc_ranges", "rswa_prefix_lens", "logits_indices_padded"):
        if getattr(common, name, None) is not None:
            return f"{DenseReason.UNKNOWN_ARGUMENT}: {name}"
    return None
