"""Hugging Face tensor parallelism: which ranks hold the other heads of a model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_SPLIT = "colwise"  # the style of a projection whose heads stay split over the ranks


def tensor_parallel_group(model: PreTrainedModel) -> ProcessGroup | None:
    """Return the group that a model's heads are split over, None where each rank has all.

    Some families' plans split attention, others gather queries and keys again before it,
    because a normalisation needs all of them; these run as one process does.

    Raises:
        ValueError: if the ranks cannot hold equally many whole heads.
    """
    ranks = getattr(model, "_tp_size", None)
    if ranks in (None, 1):
        return None
    plan = model.tp_plan or {}
    split = {name.rpartition(".")[2] for name, style in plan.items() if style == _SPLIT}
    if not split & {"q_proj", "q_b_proj", "qkv_proj"}:
        return None
    config = model.config.get_text_config(decoder=True)
    for heads, projection in (
        ("num_attention_heads", "q_proj"),
        ("num_key_value_heads", "k_proj"),
    ):
        count = getattr(config, heads, None)
        if projection in split and count is not None and count % ranks:
            raise ValueError(
                f"model must have a multiple of its {ranks} tensor parallel ranks as {heads}, "
                f"so that each holds whole heads; got {count}"
            )
    mesh = model._device_mesh
    if mesh is None:
        raise ValueError(
            f"model must carry the device mesh that it is split over; got none for {ranks} ranks"
        )
    group: ProcessGroup = (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()
    return group
