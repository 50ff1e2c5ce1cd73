"""The variants of the frontier study against dense attention and the library's operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.frontier.variants import Variant, attention, landmark_scores, samples

from token_sparse_attention import TokenSparseConfig, token_sparse_attention
from token_sparse_attention.attention.dense import attend

CONFIG = TokenSparseConfig.published(
    drop_mass=0.5,
    window_size=8,
    pool_size=3,
    min_tokens=10,
    fallback="window",
    fallback_window=16,
    crossover="off",
    budget="per_head",
)


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 203, 16, generator=generator) * 2
    key, value = torch.randn(2, 1, 2, 203, 16, generator=generator)
    return query, key, value


def run(qkv, **fields):
    out, selection = attention(*qkv, CONFIG, Variant(**fields), scale=0.25)
    assert selection.ran_sparse.all()
    assert (selection.lengths < 150).all()
    return out, selection


def dense(qkv):
    return attend(*qkv, scale=0.25).out


def test_without_a_variant_it_is_the_library_s_operator(qkv):
    expected = token_sparse_attention(*qkv, CONFIG, scale=0.25)
    torch.testing.assert_close(run(qkv)[0], expected)


@pytest.mark.parametrize("union", [False, True])
def test_summaries_of_single_tokens_make_it_dense(qkv, union):
    out, _ = run(qkv, pooled=1, union=union)
    torch.testing.assert_close(out, dense(qkv), rtol=1e-4, atol=1e-5)
    out, _ = run(qkv, pooled=1, fallback="keys")
    torch.testing.assert_close(out, dense(qkv), rtol=1e-4, atol=1e-5)


def test_each_half_of_the_summaries_goes_to_its_queries(qkv):
    plain, selection = run(qkv)
    chosen = torch.zeros(4, 203, dtype=torch.bool)
    for head in range(4):
        chosen[head, selection.indices[0, head, : selection.lengths[0, head]]] = True
    for which, mask in (("selected", chosen), ("fallback", ~chosen)):
        out, _ = run(qkv, pooled=1, pooled_for=which)
        torch.testing.assert_close(out[0][mask], dense(qkv)[0][mask], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out[0][~mask], plain[0][~mask])


def test_the_oracles_and_the_last_queries_are_dense(qkv):
    out, _ = run(qkv, selected="dense", fallback="dense")
    torch.testing.assert_close(out, dense(qkv))
    out, _ = run(qkv, dense_last=20)
    torch.testing.assert_close(out[:, :, -20:], dense(qkv)[:, :, -20:])
    torch.testing.assert_close(out[:, :, :-20], run(qkv)[0][:, :, :-20])


def test_neighbours_of_selected_tokens_are_selected_too(qkv):
    _, plain = run(qkv)
    out, more = run(qkv, neighbours=2)
    for head in range(4):
        slots = plain.indices[0, head, : plain.lengths[0, head]]
        expected = {
            near
            for slot in slots.tolist()
            for near in range(slot - 2, slot + 3)
            if 0 <= near < 203
        }
        size = int(more.lengths[0, head])
        assert more.indices[0, head, :size].tolist() == sorted(expected)
        assert (more.indices[0, head, size:] == -1).all()
    # Where all keys are alike, a query that may attend to more of them still gets their value.
    query, key, value = qkv
    alike = query, key[:, :, :1].expand_as(key), value[:, :, :1].expand_as(value)
    same, _ = run(alike, neighbours=2)
    torch.testing.assert_close(same[0, 1], value[0, 0, :1].expand(203, -1), rtol=1e-4, atol=1e-5)
    assert not torch.equal(out, run(qkv)[0])


@pytest.mark.parametrize("size", [4, 64])
def test_larger_blocks_are_means_weighted_by_their_count(qkv, size):
    query, key, value = qkv
    equal = key[:, :, :1].expand_as(key).contiguous()  # then all that counts is how many
    out, _ = run((query, equal, value), fallback="keys", pooled=size)
    reach = torch.arange(203) - CONFIG.fallback_window
    head, at = 3, 150
    slots = run((query, equal, value))[1]
    slots = slots.indices[0, head, : slots.lengths[0, head]]
    seen = torch.zeros(203, dtype=torch.bool)
    seen[reach[at] + 1 : at + 1] = True
    seen[slots[slots <= reach[at]]] = True
    seen[: (int(reach[at]) + 1) // size * size] = True
    expected = value[0, 1][seen].mean(0)
    torch.testing.assert_close(out[0, head, at], expected, rtol=1e-4, atol=1e-5)


def test_keys_alone_are_seen_by_all_queries(qkv):
    query, key, value = qkv
    out, selection = run(qkv, fallback="keys")
    head, at = 1, 180
    slots = selection.indices[0, head, : selection.lengths[0, head]]
    seen = torch.arange(203) > at - CONFIG.fallback_window
    seen[slots] = True
    seen &= torch.arange(203) <= at
    logits = (query[0, head, at] @ key[0, 0].T * 0.25).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(out[0, head, at], logits.softmax(-1) @ value[0, 0])


def test_landmarks_are_seen_by_the_others_only(qkv):
    plain, selection = run(qkv)
    out, _ = run(qkv, landmarks=195)  # all that have a score
    chosen = torch.zeros(4, 203, dtype=torch.bool)
    for head in range(4):
        chosen[head, selection.indices[0, head, : selection.lengths[0, head]]] = True
    torch.testing.assert_close(out[0][chosen], plain[0][chosen])
    torch.testing.assert_close(out[0][~chosen], dense(qkv)[0][~chosen], rtol=1e-4, atol=1e-5)
    few, _ = run(qkv, landmarks=3)
    assert not torch.allclose(few, plain)
    assert not torch.allclose(few, out)


def test_the_other_scores_select_other_tokens(qkv):
    base = run(qkv)[1].indices
    for fields in ({"value_norm": True}, {"spread": 4}):
        other, selection = run(qkv, **fields)
        assert not torch.equal(selection.indices, base)
        assert other.isfinite().all()


def test_a_sequence_that_runs_dense_stays_dense(qkv):
    config = replace(CONFIG, min_tokens=500)
    out, selection = attention(*qkv, config, Variant(pooled=4, dense_last=5), scale=0.25)
    assert not selection.ran_sparse.any()
    torch.testing.assert_close(out, dense(qkv))


def test_landmarks_may_be_chosen_by_queries_of_the_whole_sequence(qkv):
    query, key, _ = qkv
    scores = landmark_scores(query, key, 7, 16, 0.25)
    head, expected = 2, torch.zeros(203)
    for at in (28, 57, 86, 115, 144, 173, 202):
        logits = query[0, head, at] @ key[0, 1, : at + 1].T * 0.25
        expected[: at - 15] += logits.softmax(-1)[: at - 15] / 7
    torch.testing.assert_close(scores[0, head], expected)
    base = run(qkv, landmarks=10)[0]
    theirs = run(qkv, landmarks=10, landmarks_by=7)[0]
    assert not torch.allclose(base, theirs)
    own = run(qkv, landmarks=10, landmarks_by=7, own_landmarks=10)[0]
    torch.testing.assert_close(own, base)


def test_each_segment_has_landmarks_of_its_own(qkv):
    fields = {"landmarks": 12, "landmarks_by": 4}
    out, selection = run(qkv, segments=3, **fields)
    whole, _ = run(qkv, **fields)
    # The last segment's queries choose as those of a call that asks for them alone.
    scores = landmark_scores(qkv[0][:, :, 135:], qkv[1], 4, 16, 0.25)
    chosen = scores[0].topk(12, dim=-1).indices
    head = 1
    query, key, value = qkv[0][0, head], qkv[1][0, 0], qkv[2][0, 0]
    unselected = [
        at
        for at in range(135, 203)
        if at not in selection.indices[0, head, : selection.lengths[0, head]].tolist()
    ]
    assert unselected
    for at in unselected:
        far = chosen[head][chosen[head] <= at - 16].tolist()
        seen = [*far, *range(at - 15, at + 1)]
        weights = (query[at] @ key[seen].T * 0.25).softmax(-1)
        torch.testing.assert_close(out[0, head, at], weights @ value[seen], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, whole)


def test_samples_of_every_token_make_it_dense(qkv):
    out, selection = run(qkv, samples=203, landmarks=20)
    chosen = torch.zeros(4, 203, dtype=torch.bool)
    for head in range(4):
        own = selection.indices[0, head, : selection.lengths[0, head]]
        chosen[head, own] = True
    torch.testing.assert_close(out[0][~chosen], dense(qkv)[0][~chosen], rtol=1e-4, atol=1e-5)


def test_a_sample_stands_for_its_part():
    without = torch.tensor([[0, 1, 2, 3, 9], [4, 5, 6, 12, 12]])
    slots, counts = samples(11, 3, without)
    assert counts.tolist() == [[0.0, 4.0, 2.0], [4.0, 1.0, 3.0]]
    assert slots[0, 0] == 11  # a part of landmarks alone
    assert slots[1, 1] == 7
    drawn = {tuple(samples(11, 3, without)[0][0].tolist()) for _ in range(3)}
    assert len(drawn) == 1, "the same prompt must give the same answer"
    assert 4 <= slots[0, 1] <= 7
    assert slots[0, 2] in (8, 10)


def test_drawing_all_tokens_makes_it_dense(qkv):
    out, _ = run(qkv, drawn=203, selected="others")
    torch.testing.assert_close(out, dense(qkv), rtol=1e-4, atol=1e-5)
    errors = [
        float((run(qkv, selected="others", **fields)[0] - out).norm())
        for fields in ({"drawn": 100, "landmarks_by": 20}, {"drawn": 20, "landmarks_by": 20}, {})
    ]
    assert errors == sorted(errors)


def test_the_library_took_over_what_won(qkv):
    theirs = run(qkv, drawn=60, selected="others", dense_last=9)[0]
    config = replace(
        CONFIG,
        budget="shared",
        drop_mass=None,
        select_queries=False,
        fallback_samples=60,
        dense_queries=9,
    )
    torch.testing.assert_close(token_sparse_attention(*qkv, config, scale=0.25), theirs)
