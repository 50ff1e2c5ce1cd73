"""Guesses at how a reply goes on."""

from __future__ import annotations

import torch

from token_sparse_attention.evaluation.drafts import propose

PROMPT = torch.tensor([1, 2, 3, 4, 5, 6, 1, 2, 9])


def test_a_draft_that_began_alike_goes_first():
    assert propose([7, 8], [[7], [7, 9, 1], [7, 8, 5, 5], [7, 8, 6]], PROMPT) == [5, 5]


def test_a_finished_draft_proposes_nothing():
    assert propose([7, 8], [[7, 8]], PROMPT) == []


def test_the_last_tokens_are_looked_up_in_the_prompt():
    assert propose([7, 3, 4], [], PROMPT) == [5, 6, 1, 2, 9, 7, 3, 4]
    assert propose([7, 1, 2], [], PROMPT)[0] == 9  # where they were last
    assert propose([2, 3, 4, 5], [], PROMPT)[0] == 6
    assert propose([7, 8], [], PROMPT) == []


def test_the_reply_s_own_end_is_not_found():
    assert propose([8], [], torch.tensor([7])) == []
    assert propose([8, 8, 8], [], torch.tensor([7])) == [8]


def test_the_lookup_reaches_into_the_prompt_s_end():
    assert propose([3], [], torch.tensor([2, 3, 5, 2]))[0] == 5
