"""Read what a Hugging Face attention mask says: where the queries and the real tokens are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MaskLayout(NamedTuple):
    """How the queries of a call lie among its keys.

    Attributes:
        kv_len: keys in use; later ones are empty cache slots. Queries are the last ones.
        padding_mask: ``[B, kv_len]`` bool, True for real tokens; None if all are.
    """

    kv_len: int
    padding_mask: Tensor | None


def read_mask(mask: Tensor | None, query_len: int, kv_len: int) -> MaskLayout | None:
    """Return the layout, or None if the mask is anything but causal plus padding.

    Without a mask, attention is causal: over all keys where there are as many as queries,
    else (a fresh static cache) over the first ``query_len``. With a mask, the first query's
    slot and the padding are read off it, and the whole mask is compared with what they
    imply.

    Args:
        mask: ``[B, 1, S_q, S_kv]``, bool (True where attended) or additive; or None.
        query_len: S_q.
        kv_len: S_kv, keys handed over.
    """
    if mask is None:
        return MaskLayout(query_len, None)
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2:] != (query_len, kv_len):
        return None
    visible = _visible(mask)
    if visible is None:
        return None
    slot = torch.arange(kv_len, device=mask.device)
    query = torch.arange(query_len, device=mask.device)
    # As bytes: index arithmetic over the whole mask would take eight times its memory.
    last_visible = kv_len - 1 - visible.flip(-1).view(torch.uint8).argmax(-1)
    last_visible = last_visible.where(visible.any(-1), -1)
    first_query = int((last_visible - query).max())
    used = first_query + query_len
    if first_query < 0 or used > kv_len:
        return None
    padding_mask = visible[:, -1, :used]
    causal = slot[:used] <= first_query + query[:, None]
    # Nothing beyond the slots in use is visible, or first_query would be larger.
    as_expected = (visible[..., :used] == (causal & padding_mask[:, None])).all()
    if not as_expected or not _one_run(padding_mask):
        return None
    return MaskLayout(used, None if padding_mask.all() else padding_mask)


def _visible(mask: Tensor) -> Tensor | None:
    """Return which keys each query sees ``[B, S_q, S_kv]``; None if a number says neither.

    A number hides a key if it is about the least of its dtype: the sum of two such is -inf, and
    a mask in single precision may hold bfloat16's least. Any other number but 0 changes weights.
    """
    if mask.dtype == torch.bool:
        return mask[:, 0]
    visible = (mask == 0)[:, 0]
    hidden = (mask <= torch.finfo(mask.dtype).min / 2)[:, 0]
    return visible if bool((visible ^ hidden).all()) else None


def _one_run(padding_mask: Tensor) -> bool:
    """Return whether every sequence's slots are one run of True."""
    starts = padding_mask[:, :1].sum(-1) + (padding_mask[:, 1:] & ~padding_mask[:, :-1]).sum(-1)
    return bool((starts == 1).all())
