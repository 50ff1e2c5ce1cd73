"""Each pattern against its paper read literally, and all of them as dense replacements."""

from __future__ import annotations

import json

import pytest
import torch

from support import causal_attention, make_problem, relative_error
from token_sparse_attention.attention.block_mask import BlockGrid
from token_sparse_attention.attention.patterns import PATTERNS, find_pattern
from token_sparse_attention.attention.patterns.estimate import block_means
from token_sparse_attention.attention.patterns.flexprefill import (
    FlexPrefillConfig,
    divergence,
    flexprefill_mask,
    last_block,
)
from token_sparse_attention.attention.patterns.minference import (
    HeadBudget,
    MInferenceConfig,
    load_head_budgets,
    minference_attention,
    slash_blocks,
    vertical_slash,
)
from token_sparse_attention.attention.patterns.streaming import StreamingConfig, streaming_mask
from token_sparse_attention.attention.patterns.xattention import (
    XAttentionConfig,
    antidiagonal_scores,
    xattention_mask,
)
from token_sparse_attention.reference import masked_attention

SCALE = 0.3
SHAPES = [(96, 96, 4, 4), (101, 101, 4, 1), (75, 130, 4, 2), (5, 40, 2, 1)]
EVERYTHING = {
    "flexprefill": FlexPrefillConfig(gamma=1.0),
    "minference": MInferenceConfig(vertical_size=500, slash_size=500),
    "xattention": XAttentionConfig(threshold=1.0),
    "streaming": StreamingConfig(local_size=500),
}
LITTLE = {
    "flexprefill": FlexPrefillConfig(gamma=0.4, min_budget=0),
    "minference": MInferenceConfig(
        vertical_size=9, slash_size=4, last_queries=8, sink_size=2, local_size=2
    ),
    "xattention": XAttentionConfig(stride=4, threshold=0.4),
    "streaming": StreamingConfig(sink_size=8, local_size=16),
}


def problem_of(shape, **other):
    query_len, kv_len, heads, kv_heads = shape
    return make_problem(
        query_len=query_len, kv_len=kv_len, heads=heads, kv_heads=kv_heads, **other
    )


def cover(mass: dict, share: float, minimum: int = 0) -> set:
    """The fewest keys of `mass` with `share` of it, at least `minimum`."""
    chosen, total, reached = set(), sum(mass.values()), 0.0
    for entry in sorted(mass, key=lambda entry: -mass[entry]):
        if reached >= share * total and len(chosen) >= minimum:
            break
        chosen.add(entry)
        reached += mass[entry]
    return chosen


def attention_matrix(query, key):
    """``[S_q, S_kv]`` causal attention of one head in float64."""
    slot = torch.arange(len(key))
    causal = slot <= slot[len(key) - len(query) :, None]
    logits = (query.double() @ key.double().T * SCALE).masked_fill(~causal, -torch.inf)
    return logits.softmax(-1)


def literal_flexprefill(query, key, config, block):
    """Algorithms 1 to 4 for one head: is it query-aware, and its pairs of blocks."""
    query_len, kv_len = len(query), len(key)
    query_blocks = [range(i, min(i + block, query_len)) for i in range(0, query_len, block)]
    kv_blocks = [range(i, min(i + block, kv_len)) for i in range(0, kv_len, block)]
    offset = kv_len - query_len
    minimum = -(-config.min_budget // block)
    last = attention_matrix(query, key)[-block:]
    means = torch.stack([key.double()[list(part)].mean(0) for part in kv_blocks])
    estimate = (query.double()[-block:].mean(0) @ means.T * SCALE).softmax(-1)
    truth = torch.stack([last[:, list(part)].sum(1).mean() for part in kv_blocks])
    middle = (estimate + truth) / 2
    apart = sum((p * (p / middle).log()).sum() for p in (estimate, truth)) / 2
    chosen = set()
    if apart.sqrt() < config.tau:
        mass = {}
        for m, rows in enumerate(query_blocks):
            seen = [n for n, part in enumerate(kv_blocks) if part[0] <= rows[-1] + offset]
            probs = (query.double()[list(rows)].mean(0) @ means[seen].T * SCALE).softmax(-1)
            row = {(m, n): float(p) for n, p in zip(seen, probs)}
            chosen |= cover(row, 0.0, minimum)
            mass |= row
        chosen |= cover(mass, config.gamma)
    else:
        columns = {n: float(last[:, list(part)].sum()) for n, part in enumerate(kv_blocks)}
        distances = dict.fromkeys(range(len(kv_blocks)), 0.0)
        for row in range(len(last)):
            position = kv_len - len(last) + row
            for slot in range(position + 1):
                distances[(position - slot) // block] += float(last[row, slot])
        vertical = cover(columns, config.gamma, minimum)
        slash = cover(distances, config.gamma, minimum)
        for row in range(query_len):
            for slot in range(row + offset + 1):
                if slot // block in vertical or (row + offset - slot) // block in slash:
                    chosen.add((row // block, slot // block))
    return bool(apart.sqrt() < config.tau), chosen


@pytest.mark.parametrize("min_budget", [0, 24])
@pytest.mark.parametrize("shape", SHAPES)
def test_flexprefill_is_the_paper_read_literally(shape, min_budget):
    block = 8
    problem = problem_of(shape, batch=2, sharpness=1.0)
    grid = BlockGrid(shape[0], shape[1], (block, block))
    apart = last_block(
        problem.query, problem.key, block_means(problem.key, block), grid, SCALE
    ).divergence
    tau = float(apart.median()) + 1e-6  # so that both kinds of heads occur
    config = FlexPrefillConfig(gamma=0.6, tau=tau, min_budget=min_budget)
    mask = flexprefill_mask(problem.query, problem.key, config, SCALE, (block, block))
    mask.validate()
    always = grid.visible(torch.device("cpu")) & ~grid.earlier(torch.device("cpu"))
    always[:, 0] = True
    kinds = set()
    for row in range(2):
        for head in range(shape[2]):
            head_key = problem.key[row, head // (shape[2] // shape[3])]
            query_aware, chosen = literal_flexprefill(
                problem.query[row, head], head_key, config, block
            )
            kinds.add(query_aware)
            expected = always.clone()
            for place in chosen:
                expected[place] = True
            assert torch.equal(mask.block_map()[row, head], expected)
    assert kinds == {True, False}


def test_divergence_is_zero_for_equal_and_sqrt_log_2_for_disjoint_distributions():
    one, other = torch.tensor([0.3, 0.7, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert divergence(one, one) == 0
    assert divergence(one, other) == pytest.approx(0.6931472**0.5)


def literal_xattention(query, key, config, block):
    """Antidiagonal sums and the chosen blocks of one head."""
    stride, query_len, kv_len = config.stride, len(query), len(key)
    offset = kv_len - query_len
    products = query.double() @ key.double().T * (SCALE / stride)
    rows, columns = -(-query_len // stride), -(-kv_len // stride)
    scores = {}
    chosen = set()
    for m in range(-(-query_len // block)):
        mass = dict.fromkeys(range(-(-kv_len // block)), 0.0)
        inside = [a for a in range(rows) if a * stride // block == m]
        for a in inside:
            logits = torch.full((columns,), -torch.inf, dtype=torch.float64)
            for c in range(columns):
                if c * stride <= a * stride + stride - 1 + offset:
                    logits[c] = sum(
                        products[a * stride + stride - 1 - i, c * stride + i]
                        for i in range(stride)
                        if a * stride + stride - 1 - i < query_len and c * stride + i < kv_len
                    )
            for c, share in enumerate(logits.softmax(-1).tolist()):
                mass[c * stride // block] += share / len(inside)
        scores |= {(m, n): share for n, share in mass.items()}
        chosen |= {(m, n) for n in cover(mass, config.threshold)}
    return scores, chosen


@pytest.mark.parametrize("at_once", [1, 2**26])
@pytest.mark.parametrize("shape", SHAPES)
def test_xattention_is_the_paper_read_literally(shape, at_once, monkeypatch):
    module = "token_sparse_attention.attention.patterns.xattention._SCORE_ELEMENTS"
    monkeypatch.setattr(module, at_once)
    block, config = 16, XAttentionConfig(stride=4, threshold=0.7)
    problem = problem_of(shape)
    grid = BlockGrid(shape[0], shape[1], (block, block))
    estimated = antidiagonal_scores(problem.query, problem.key, config, grid, SCALE)
    mask = xattention_mask(problem.query, problem.key, config, SCALE, (block, block))
    mask.validate()
    diagonal = grid.visible(torch.device("cpu")) & ~grid.earlier(torch.device("cpu"))
    for head in range(shape[2]):
        scores, chosen = literal_xattention(
            problem.query[0, head], problem.key[0, head // (shape[2] // shape[3])], config, block
        )
        expected = diagonal.clone()
        for place, share in scores.items():
            assert estimated[0, head][place].item() == pytest.approx(share, abs=1e-5)
        for place in chosen:
            expected[place] = True
        assert torch.equal(mask.block_map()[0, head], expected)


def test_with_a_stride_of_one_xattention_scores_are_the_true_attention():
    problem = problem_of((75, 130, 4, 2))
    grid = BlockGrid(75, 130, (16, 16))
    scores = antidiagonal_scores(
        problem.query, problem.key, XAttentionConfig(stride=1), grid, SCALE
    )
    for head in range(4):
        exact = attention_matrix(problem.query[0, head], problem.key[0, head // 2])
        for m in range(grid.query_blocks):
            for n in range(grid.kv_blocks):
                part = exact[m * 16 : (m + 1) * 16, n * 16 : (n + 1) * 16].sum(1).mean()
                assert scores[0, head, m, n].item() == pytest.approx(float(part), abs=1e-5)


def literal_minference(query, key, budget, config, block):
    """The token-level mask of one head."""
    query_len, kv_len = len(query), len(key)
    offset = kv_len - query_len
    count = min(config.last_queries, query_len)
    last = attention_matrix(query, key)[-count:]
    vertical = {slot: float(last[:, slot].sum()) for slot in range(kv_len)}
    slash = dict.fromkeys(range(kv_len), 0.0)
    for row in range(count):
        position = kv_len - count + row
        for slot in range(position + 1):
            slash[position - slot] += float(last[row, slot])
    if budget.pattern == "stream_llm":
        columns = set(range(budget.vertical_size))
        distances = set(range(budget.slash_size))
    else:
        columns = heaviest(vertical, budget.vertical_size, config.sink_size, config.coverage)
        distances = heaviest(slash, budget.slash_size, config.local_size, config.coverage)
    covered = {
        (row // block, slot // block)
        for row in range(query_len)
        for slot in range(row + offset + 1)
        if row + offset - slot in distances | {0}
    }
    allowed = torch.zeros(query_len, kv_len, dtype=torch.bool)
    for row in range(query_len):
        for slot in range(row + offset + 1):
            in_block = (row // block, slot // block) in covered
            allowed[row, slot] = in_block or slot in columns
    return allowed


def heaviest(mass, size, always, coverage):
    rest = sorted(set(mass) - set(range(always)), key=lambda entry: -mass[entry])
    kept = set([*range(always), *rest][:size])
    if coverage is None:
        return kept
    return kept & (set(range(always)) | cover(mass, coverage))


@pytest.mark.parametrize("coverage", [None, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_minference_attends_over_the_literal_token_mask(shape, coverage):
    block = 8
    budgets = tuple(
        HeadBudget("stream_llm" if head == 1 else "vertical_and_slash", 9 + 4 * head, 4 + head)
        for head in range(shape[2])
    )
    problem = problem_of(shape, batch=2)
    for heads in (None, budgets):
        config = MInferenceConfig(
            vertical_size=9,
            slash_size=4,
            last_queries=16,
            sink_size=2,
            local_size=2,
            coverage=coverage,
            heads=heads,
        )
        result = minference_attention(*problem, config, scale=SCALE, block_size=(block, block))
        for row in range(2):
            for head in range(shape[2]):
                budget = heads[head] if heads else HeadBudget("vertical_and_slash", 9, 4)
                one = (problem.query[row, head], problem.key[row, head * shape[3] // shape[2]])
                # A stream_llm head's distances are a fixed list: coverage does not apply.
                allowed = literal_minference(*one, budget, config, block)
                value = problem.value[row, head * shape[3] // shape[2]].double()
                exact = masked_attention(
                    one[0].double()[None], one[1].double()[None], value[None], allowed[None], SCALE
                )
                assert relative_error(result.out[row, head], exact[0]) < 1e-6
                logits = (one[0].double() @ one[1].double().T * SCALE).masked_fill(
                    ~allowed, -torch.inf
                )
                torch.testing.assert_close(
                    result.lse[row, head].double(), logits.logsumexp(-1), atol=1e-5, rtol=1e-5
                )


def test_minference_columns_beside_blocks_stay_a_short_list():
    """Scattered columns cost their number, not the blocks that hold them."""
    problem = problem_of((512, 512, 2, 1))
    config = MInferenceConfig(
        vertical_size=64, slash_size=8, last_queries=16, sink_size=0, local_size=8
    )
    chosen = vertical_slash(problem.query, problem.key, config, SCALE)
    assert chosen.columns.shape == (1, 2, 64)
    blocks = set((chosen.columns[0, 0] // 16).tolist())
    assert len(blocks) > 20, "the columns are not scattered"
    assert slash_blocks(chosen, 512, (16, 16)).density().max() < 0.15


@pytest.mark.parametrize("local_size", [1, 17, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_keeps_the_sink_and_the_local_blocks(shape, local_size):
    query_len, kv_len = shape[:2]
    problem = problem_of(shape)
    config = StreamingConfig(sink_size=12, local_size=local_size)
    mask = streaming_mask(problem.query, problem.key, config, SCALE, (8, 8))
    mask.validate()
    expected = torch.zeros(query_len, kv_len, dtype=torch.bool)
    offset = kv_len - query_len
    for row in range(query_len):
        oldest = row // 8 * 8 + offset - local_size + 1
        for slot in range(row + offset + 1):
            expected[row, slot] = slot < 16 or slot // 8 * 8 + 7 >= oldest
    assert (mask.dense_view() == expected).all()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pattern_that_keeps_everything_is_dense_attention(name, shape):
    problem = problem_of(shape, batch=2)
    out, lse = find_pattern(name).attend(
        *problem, EVERYTHING[name], scale=SCALE, return_lse=True, block_size=(16, 16)
    )
    dense = causal_attention(*(tensor.double() for tensor in problem), scale=SCALE)
    assert relative_error(out, dense) < 1e-6
    assert lse.shape == out.shape[:3]


@pytest.mark.parametrize("name", PATTERNS)
def test_a_row_of_a_batch_gives_what_it_gives_alone(name):
    problem = problem_of((101, 130, 4, 2), batch=3)
    pattern, config = find_pattern(name), LITTLE[name]
    together = pattern.attend(*problem, config, block_size=(16, 16))
    dense = causal_attention(*problem, scale=0.25)
    assert (together - dense).abs().max() > 1e-3, "nothing was left out"
    for row in range(3):
        alone = pattern.attend(*(x[row : row + 1] for x in problem), config, block_size=(16, 16))
        torch.testing.assert_close(together[row], alone[0])


@pytest.mark.parametrize("name", PATTERNS)
def test_bad_numbers_come_out_as_dense_attention_would_put_them(name):
    problem = problem_of((96, 96, 4, 2))
    problem.key[0, 0, 40, 3] = torch.nan  # estimates of the first group are worthless
    out = find_pattern(name).attend(*problem, LITTLE[name], block_size=(16, 16))
    dense = causal_attention(*problem, scale=0.25)
    assert out[0, 2:].isfinite().all()
    if name in ("flexprefill", "xattention"):
        assert torch.equal(out[0, :2].isnan(), dense[0, :2].isnan())
    torch.testing.assert_close(out[0, :2, :32].isnan(), dense[0, :2, :32].isnan())


@pytest.mark.parametrize("name", ["flexprefill", "xattention", "streaming"])
def test_estimates_wait_for_no_device(name):
    """Tensors without data have no value to read: any wait for one would fail here."""
    query = torch.empty(1, 8, 1000, 64, device="meta")
    key = torch.empty(1, 2, 1500, 64, device="meta")
    masks = {
        "flexprefill": flexprefill_mask,
        "xattention": xattention_mask,
        "streaming": streaming_mask,
    }
    mask = masks[name](query, key, find_pattern(name).config(), SCALE)
    assert mask.full_index.shape == (1, 8, 8, 12)


def test_minference_estimates_wait_for_no_device():
    query = torch.empty(1, 8, 1000, 64, device="meta")
    key = torch.empty(1, 2, 9000, 64, device="meta")
    chosen = vertical_slash(query, key, MInferenceConfig(coverage=0.9), SCALE)
    assert chosen.columns.shape == (1, 8, 1000)
    assert slash_blocks(chosen, 1000).full_index.shape == (1, 8, 8, 71)


HEADS = {
    "minference": MInferenceConfig(
        heads=tuple(HeadBudget("vertical_and_slash", 5 * (i + 1), 3 + i) for i in range(6)),
        local_size=2,
    ),
    "xattention": XAttentionConfig(stride=4, threshold=(0.2, 0.9, 0.5, 1.0, 0.3, 0.6)),
}


@pytest.mark.parametrize("config", [*LITTLE.values(), *HEADS.values()])
def test_many_blocks_are_taken_in_groups_of_heads(config, monkeypatch):
    problem = make_problem(batch=2, heads=6, kv_heads=3, query_len=70, kv_len=90)
    pattern = next(p for p in PATTERNS.values() if type(config) is p.config)
    expected = pattern.attend(*problem, config, return_lse=True, block_size=(8, 8))
    for pairs in (1, 2 * 2 * 2 * 9 * 12):  # one KV head, then two and the last one
        monkeypatch.setattr("token_sparse_attention.attention.patterns._BLOCK_PAIRS", pairs)
        parts = pattern.attend(*problem, config, return_lse=True, block_size=(8, 8))
        for part, whole in zip(parts, expected):
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)


def test_xattention_takes_a_threshold_per_head():
    query, key, _ = problem_of((101, 101, 4, 1))
    shares = (0.2, 0.9, 0.5, 1.0)
    config = XAttentionConfig(stride=4, threshold=list(shares))
    blocks = xattention_mask(query, key, config, SCALE, (16, 16)).block_map()
    for head, share in enumerate(shares):
        alone = XAttentionConfig(stride=4, threshold=share)
        expected = xattention_mask(query[:, head : head + 1], key, alone, SCALE, (16, 16))
        assert torch.equal(blocks[:, head], expected.block_map()[:, 0])
    with pytest.raises(ValueError, match="a share for each of the 4 query heads, got 3"):
        xattention_mask(query, key, XAttentionConfig(4, (0.5,) * 3), SCALE, (16, 16))
    with pytest.raises(ValueError, match=r"threshold\[1\] must be in \(0, 1\]"):
        XAttentionConfig(4, (0.5, 0.0))


def test_pattern_files(tmp_path):
    file = tmp_path / "patterns.json"
    file.write_text(
        json.dumps(
            [
                {"1": ["stream_llm", 100, 800, 0.9], "0": ["vertical_and_slash", 30, 50, 0.9]},
                [["vertical_and_slash", 1000, 6096], ["vertical_and_slash", 500, 700]],
            ]
        )
    )
    layers = load_head_budgets(file)
    assert layers[0] == (
        HeadBudget("vertical_and_slash", 30, 50),
        HeadBudget("stream_llm", 100, 800),
    )
    assert MInferenceConfig(heads=layers[1]).heads[1] == HeadBudget("vertical_and_slash", 500, 700)
    for content, message in (
        ("{", "is not valid JSON"),
        ("{}", "must hold a list with an entry per layer"),
        ('[{"1": ["stream_llm", 1, 1]}]', "layer 0 must number its heads from 0"),
        ('[[["block_sparse", 1, 1]]]', "layer 0, head 0 must have a pattern among"),
        ('[[["stream_llm", 1]]]', r"must be \[pattern, vertical_size, slash_size\]"),
        ('[[["stream_llm", 0, 1]]]', "vertical_size must be at least 1, got 0"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_head_budgets(file)
    file.write_text('[[["stream_llm", 1.5, 1]]]')
    with pytest.raises(TypeError, match=r"vertical_size must be an int, got 1\.5"):
        load_head_budgets(file)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (FlexPrefillConfig, {"gamma": 0.0}, r"gamma must be in \(0, 1\]"),
        (FlexPrefillConfig, {"gamma": float("nan")}, r"gamma must be in \(0, 1\], got nan"),
        (FlexPrefillConfig, {"tau": -0.1}, r"tau must be in \[0, 1\]"),
        (FlexPrefillConfig, {"min_budget": -1}, "min_budget must be at least 0"),
        (FlexPrefillConfig, {"gamma": "0.9"}, "gamma must be a number"),
        (XAttentionConfig, {"stride": 0}, "stride must be at least 1"),
        (XAttentionConfig, {"stride": True}, "stride must be an int"),
        (XAttentionConfig, {"threshold": 1.5}, r"threshold must be in \(0, 1\]"),
        (StreamingConfig, {"sink_size": -1}, "sink_size must be at least 0"),
        (StreamingConfig, {"local_size": 0}, "local_size must be at least 1"),
        (MInferenceConfig, {"vertical_size": 0}, "vertical_size must be at least 1"),
        (MInferenceConfig, {"slash_size": 2.5}, "slash_size must be an int"),
        (MInferenceConfig, {"coverage": 0.0}, r"coverage must be in \(0, 1\]"),
        (MInferenceConfig, {"heads": [("triangle", 1, 1)]}, r"heads\[0\] must have a pattern"),
    ],
)
def test_bad_settings_are_named(config, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        config(**settings)


def test_bad_calls_are_named():
    problem = problem_of((40, 40, 4, 2))
    with pytest.raises(ValueError, match="did you mean 'minference'"):
        find_pattern("minferense")
    with pytest.raises(TypeError, match="config must be a XAttentionConfig, got StreamingConfig"):
        find_pattern("xattention").attend(*problem, StreamingConfig())
    with pytest.raises(ValueError, match="backend must be one of auto, fa4, flex, reference"):
        find_pattern("xattention").attend(*problem, backend="cuda")
    with pytest.raises(ValueError, match="stride must divide the block size"):
        find_pattern("xattention").attend(*problem, XAttentionConfig(stride=7))
    with pytest.raises(ValueError, match="heads must hold a budget for each of the 4 query heads"):
        find_pattern("minference").attend(
            *problem, MInferenceConfig(heads=(HeadBudget("stream_llm", 1, 1),))
        )
