"""Reading layouts off attention masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from token_sparse_attention.integrations.attention_mask import read_mask


def make_mask(spans, query_len, used, capacity):
    """The mask transformers builds: causal, padded, with empty slots at the end."""
    slot = torch.arange(capacity)
    causal = slot <= (used - query_len + torch.arange(query_len))[:, None]
    real = torch.stack([(slot >= start) & (slot < end) for start, end in spans])
    return causal & real[:, None, None]


@given(st.data())
def test_any_padded_layout_is_read_back(data):
    query_len = data.draw(st.integers(1, 12))
    past = data.draw(st.integers(0, 12))
    used = query_len + past
    spans = [(0, used)]  # one row without padding tells where the queries are
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, used - 1))
        spans.append((start, data.draw(st.integers(start + 1, used))))
    capacity = used + data.draw(st.integers(0, 5))
    mask = make_mask(spans, query_len, used, capacity)
    padding = torch.zeros(len(spans), used, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        padding[row, start:end] = True
    for given_mask in (mask, torch.where(mask, 0.0, torch.finfo(torch.float32).min)):
        layout = read_mask(given_mask, query_len, capacity)
        assert layout is not None
        assert layout.kv_len == used
        if padding.all():
            assert layout.padding_mask is None
        else:
            assert torch.equal(layout.padding_mask, padding)


@given(st.data())
def test_a_flipped_entry_of_a_real_query_is_never_accepted_as_the_same(data):
    query_len = data.draw(st.integers(3, 10))
    past = data.draw(st.integers(0, 6))
    used = query_len + past
    mask = make_mask([(0, used)], query_len, used, used)
    row = data.draw(st.integers(0, query_len - 2))
    column = data.draw(st.integers(0, used - 1))
    mask[0, 0, row, column] ^= True
    assert read_mask(mask, query_len, used) is None


def test_no_mask_means_causal_over_the_first_queries():
    assert read_mask(None, 5, 5) == (5, None)
    assert read_mask(None, 5, 9) == (5, None)


def test_other_shapes_are_not_read():
    mask = make_mask([(0, 6)], 6, 6, 6)
    assert read_mask(mask, 6, 7) is None
    assert read_mask(mask[0], 6, 6) is None
    assert read_mask(mask.expand(1, 2, 6, 6), 6, 6) is None
    assert read_mask(torch.zeros_like(mask), 6, 6) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_hide_a_key_or_leave_it_alone(dtype):
    """Any other number changes weights, which is neither causal nor padding."""
    visible = make_mask([(0, 6), (2, 6)], 6, 6, 6)
    least = torch.finfo(dtype).min
    for hidden in (least, -torch.inf, torch.tensor(torch.finfo(torch.bfloat16).min).to(dtype)):
        mask = torch.where(visible, 0.0, hidden).to(dtype)
        assert read_mask(mask, 6, 6).kv_len == 6
    for number in (-0.5, 0.5, -100.0, -10_000.0, torch.nan, torch.inf):
        for whole in (True, False):  # in a column, as padding would be, and in one place
            mask = torch.where(visible, 0.0, least).to(dtype)
            if whole:
                mask[0, :, :, 0] = number
            else:
                mask[0, 0, 3, 1] = number
            assert read_mask(mask, 6, 6) is None
