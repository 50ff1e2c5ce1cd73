"""What the plugin asks of SGLang: its configuration, its ranks, its layers, its batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from token_sparse_attention.config import KVSamplingConfig, SparseConfig
from token_sparse_attention.gate import DenseReason
from token_sparse_attention.integrations.serving.settings import (
    ENTRIES,
    KEY,
    Settings,
    read_settings,
    selects_tokens,
)
from token_sparse_attention.integrations.sglang.plugin import NAME

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OPTION = "json_model_override_args"
_ENTRIES = tuple(entry for entry in ENTRIES if entry != "warm_up")
_MOST_PLACES = 4  # for each probe: pages smaller than its stride leave places unused
# Of a batch: attributes that ask for something else than causal attention to all earlier tokens.
_UNKNOWN = ("encoder_lens", "multi_item_delimiter_indices", "attn_cp_metadata", "spec_info")


def engine_settings(runner: Any) -> Settings:
    """Return the plugin's settings in the configuration of SGLang's model runner.

    Raises:
        TypeError: if a setting has the wrong type.
        ValueError: if a setting is bad or missing, or SGLang's configuration does not go with it.
    """
    from sglang.srt.runtime_context import get_memory

    settings = read_settings(runner.model_config.model_override_args, _OPTION, _ENTRIES)
    if settings is None:
        raise ValueError(
            f"attention backend {NAME} needs {_OPTION}[{KEY!r}] with a 'profile' or a 'config'"
        )
    check_needs(_needs(runner))
    configs = settings.layer_configs(runner.model_config.num_hidden_layers).values()
    check_page_size(runner.page_size, configs)
    if not get_memory().disable_radix_cache:
        check_shared_prefixes(settings, configs)
    return settings


def _needs(runner: Any) -> dict[str, tuple[object, object]]:
    """Return what the plugin needs, and what it finds, by name."""
    from sglang.srt.runtime_context import get_disagg, get_exec, get_parallel

    parallel, execution = get_parallel(), get_exec()
    speculative = runner.spec_algorithm
    return {
        "speculative_algorithm": (None, None if speculative.is_none() else speculative.name),
        "attention": ("MHA", "MLA" if runner.use_mla_backend else "MHA"),
        "is_encoder_decoder": (False, bool(runner.model_config.is_encoder_decoder)),
        "attn_cp_size": (1, parallel.attn_cp_size),
        "dcp_size": (1, parallel.attn_dcp_size),
        "enable_two_batch_overlap": (False, bool(execution.overlap.enable_two_batch_overlap)),
        "enable_pdmux": (False, bool(get_disagg().enable_pdmux)),
        "KV pool": ("MHATokenToKVPool", type(runner.token_to_kv_pool).__name__),
        "CUDA graphs of prefills (--disable-prefill-cuda-graph)": (
            "disabled",
            str(execution.graph.cuda_graph_config.prefill.backend),
        ),
    }


def check_needs(needs: Mapping[str, tuple[object, object]]) -> None:
    """Raise ValueError unless everything is as the plugin needs it.

    Args:
        needs: what is needed and what was found, by name.
    """
    for name, (needed, found) in needs.items():
        if found != needed:
            raise ValueError(f"token sparse attention needs {name} {needed}, got {found}")


def check_page_size(page_size: int, configs: Iterable[SparseConfig]) -> None:
    """Raise ValueError if pages are so small that probes would take too much memory."""
    for config in configs:
        if isinstance(config, KVSamplingConfig) and page_size * _MOST_PLACES < config.probe_stride:
            raise ValueError(
                f"page_size must be at least {-(-config.probe_stride // _MOST_PLACES)}, because "
                f"each page has room for a probe and every {config.probe_stride}th token is one; "
                f"got {page_size}"
            )


def check_shared_prefixes(settings: Settings, configs: Iterable[SparseConfig]) -> None:
    """Raise ValueError if prefixes are shared that depend on who computed them."""
    if settings.prefix_caching == "refuse" and selects_tokens(configs):
        raise ValueError(
            "token selection does not start while the radix cache is on, because a cached prefix "
            "holds what an earlier prompt's selection made of it; start SGLang with "
            f"--disable-radix-cache, or set {_OPTION}[{KEY!r}]['prefix_caching'] to 'allow'"
        )


def cuts_prompts() -> bool:
    """Return whether SGLang cuts long prompts into chunks."""
    from sglang.srt.runtime_context import get_schedule

    return (get_schedule().chunked_prefill_size or 0) > 0


def dense_backend(runner: Any) -> str:
    """Return the name of the backend for all that runs dense.

    It is the decode backend if SGLang was given another one than this; else the first of
    ``torch_native`` on a CPU, ``fa3`` on a Hopper GPU, and ``triton``.
    """
    from sglang.srt.utils import get_device_capability

    named = str(runner.decode_attention_backend_str)
    if named != NAME:
        return named
    if runner.device == "cpu":
        return "torch_native"
    return "fa3" if get_device_capability()[0] == 9 else "triton"


def tensor_parallel_group() -> tuple[ProcessGroup | None, int]:
    """Return the group of tensor-parallel ranks, None if there is one rank; and this rank."""
    from sglang.srt.distributed.parallel_state import get_attn_tp_group

    group = get_attn_tp_group()
    return (group.device_group if group.world_size > 1 else None), group.rank_in_group


def usable_layers(
    settings: Settings, runner: Any
) -> tuple[dict[Any, SparseConfig], dict[str, str]]:
    """Return the config of each layer that can run sparse, and why others cannot, by name."""
    from sglang.srt.layers.radix_attention import RadixAttention

    by_number = settings.layer_configs(runner.model_config.num_hidden_layers)
    quantised = runner.token_to_kv_pool.dtype != runner.dtype
    configs, obstacles = {}, {}
    for name, module in runner.model.named_modules():
        config = by_number.get(getattr(module, "layer_id", -1))
        if not isinstance(module, RadixAttention) or config is None:
            continue
        obstacle = str(DenseReason.QUANTISED_CACHE) if quantised else layer_obstacle(module)
        if obstacle is None:
            configs[module] = config
        else:
            obstacles[name] = obstacle
    return configs, obstacles


def layer_obstacle(layer: Any) -> str | None:
    """Return why one of SGLang's layers can never run sparse, None if it can."""
    window = layer.sliding_window_size
    obstacles = {
        str(DenseReason.NOT_CAUSAL): layer.is_cross_attention or layer.attn_type.name != "DECODER",
        str(DenseReason.SLIDING_WINDOW): window is not None and window > -1,
        str(DenseReason.SOFT_CAP): layer.logit_cap > 0,
        str(DenseReason.HEAD_DIM): layer.qk_head_dim != layer.v_head_dim,
        f"{DenseReason.UNKNOWN_ARGUMENT}: use_irope": layer.use_irope,
        f"{DenseReason.UNKNOWN_ARGUMENT}: pos_encoding_mode": layer.pos_encoding_mode != "NONE",
        f"{DenseReason.UNKNOWN_ARGUMENT}: xai_temperature_len": layer.xai_temperature_len > 0,
    }
    return next((text for text, stands in obstacles.items() if stands), None)


def batch_obstacle(batch: Any) -> str | None:
    """Return why no request of a batch can run sparse, None if some may."""
    for name in _UNKNOWN:
        if getattr(batch, name, None) is not None:
            return f"{DenseReason.UNKNOWN_ARGUMENT}: {name}"
    return None
