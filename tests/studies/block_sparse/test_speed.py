"""Block-sparse attention's times: what is measured, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from benchmarks.block_sparse.inputs import random_mask, structured_inputs
from benchmarks.block_sparse.speed import (
    ESTIMATORS,
    BlockOptions,
    check_blocks,
    measure,
)
from benchmarks.block_sparse.tables import (
    BLOCK_TABLES,
    BLOCK_TARGETS,
    floor_ms,
    rate,
)
from benchmarks.markdown import build
from benchmarks.operator.targets import outcomes

from studies.synthetic import PROVENANCE, S, changed, record
from token_sparse_attention.attention.block_mask import BlockGrid, BlockMask
from token_sparse_attention.attention.block_sparse import block_sparse_attention
from token_sparse_attention.benchmark.checks import random_inputs
from token_sparse_attention.benchmark.options import OpOptions
from token_sparse_attention.benchmark.record import ResultFile
from token_sparse_attention.benchmark.runs import Run
from token_sparse_attention.errors import UsageError

CPU = torch.device("cpu")


def result() -> ResultFile:
    """128K tokens: dense at 648 TFLOP/s, the executor at 600, the plain kernel at 300."""
    checked = {"passed": True, "error": 2e-3}
    records = []
    for density in (0.2, 0.4):
        times = {"dense": 217.3, "fa4": 235.0 * density, "flex": 340.0 * density}
        times["triton"] = 470.0 * density
        records += [
            record(f"block/{name}", ms=ms, kept=density, **checked) for name, ms in times.items()
        ]
        records.append(record("block/lists", ms=0.2, kept=density))
    for name, kept, estimate, attend in (
        ("flexprefill", 0.21, 4.0, 50.0),
        ("minference", 0.4, 20.0, 100.0),
        ("xattention-8", 0.22, 15.0, 52.0),
        ("xattention-16", 0.23, 9.0, 52.0),
    ):
        note = "threshold 0.5" if name.startswith("xattention") else ""
        records += [
            record(f"estimate/{name}", ms=estimate, kept=kept, note=note, **checked),
            record(f"attend/{name}", ms=attend, kept=kept, **checked),
            record("block/matmul", ms=1.5, kept=kept, note="side 8192", passed=True),
        ]
    records.append(record("estimate/streaming", "skipped", kept=0.2, note="RuntimeError: no"))
    return ResultFile(PROVENANCE, {"command": "tsa bench block"}, tuple(records))


def rows(name, of=None):
    lines = build(name, [Run("fast", of or result())], BLOCK_TABLES).splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in found} == {len(found[0])}, "every row has every column"
    return found[2:]


def test_rates_count_the_attended_blocks():
    blocks = 0.4 * 1024 * 1025 / 2 * 32
    work = 4 * 128 * 128 * 128 * blocks
    assert rate(record("block/fa4", ms=94.0, kept=0.4)) == pytest.approx(work / 0.094 / 1e12)
    dense = rate(record("block/dense", ms=217.3, kept=0.4))
    assert dense == pytest.approx(rate(record("block/fa4", ms=217.3 * 0.4, kept=0.4)))


def test_the_floor_is_one_product_over_the_causal_half():
    run = Run("fast", result())
    half = 0.5 * (S / 8) ** 2
    product = 2 * half * (8 * 128) * 32
    speed = 2 * 8192**3 / 1.5
    assert floor_ms(run, record("estimate/xattention-8", kept=0.22)) == pytest.approx(
        product / speed
    )


def test_tables_say_what_was_measured():
    speed = rows("block-speed")
    assert [row[:3] for row in speed] == [["fast", "128K", "0.2"], ["fast", "128K", "0.4"]]
    assert speed[1][7:] == ["2.00x", "92%", "0.2"]
    found = {row[2]: row[3:] for row in rows("block-estimates")}
    assert found["flexprefill"] == ["", "0.21", "4", "50", "8.0%", "-", "-"]
    assert found["xattention-8"] == ["threshold 0.5", "0.22", "15", "52", "28.8%", "12", "1.25x"]
    assert found["streaming"][0] == "RuntimeError"


def test_aims_are_met_or_missed_and_nothing_is_claimed_unchecked():
    def verdicts(of):
        return {aim: (said, how) for aim, said, how, _ in outcomes([Run("", of)], BLOCK_TARGETS)}

    found = verdicts(result())
    assert len(found) == len(BLOCK_TARGETS)
    said = {how for aim, (_, how) in found.items() if not aim.startswith("128K")}
    assert said == {"not measured"}
    at_128k = [value for aim, value in found.items() if aim.startswith("128K")]
    assert [how for _, how in at_128k] == ["met", "met", "met", "met", "missed", "met", "met"]
    assert at_128k[0][0] == "2.00x at 0.2"
    assert at_128k[4][0] == "20.0% at 0.40"
    for name, place in (("block/fa4", 0), ("block/dense", 2), ("estimate/flexprefill", 3)):
        wrong = verdicts(changed(result(), name, passed=False))
        assert [v for a, v in wrong.items() if a.startswith("128K")][place][1] == "check failed"


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_random_masks_have_the_density_asked_for(density):
    inputs = random_inputs(4096, 8, 2, 16, CPU, torch.float32)
    mask, kept = random_mask(inputs, density)
    mask.validate()
    assert float(mask.density().mean()) == pytest.approx(density, abs=0.02)
    assert not torch.equal(kept[0, 0], kept[0, 1]), "every head has its own"


def test_the_check_finds_a_wrong_block():
    inputs = random_inputs(1024, 4, 2, 16, CPU, torch.float32)
    mask, kept = random_mask(inputs, 0.6)
    out = block_sparse_attention(*inputs, mask)
    assert check_blocks(inputs, out, mask, 1e-6).passed
    kept[0, 0, 7, :3] = ~kept[0, 0, 7, :3]
    other = BlockMask.from_block_map(kept, BlockGrid(1024, 1024))
    assert not check_blocks(inputs, out, other, 1e-6).passed


def test_structured_inputs_are_sparser_than_noise():
    noise = random_inputs(4096, 4, 2, 64, CPU, torch.float32)
    shaped = structured_inputs(noise)
    assert torch.equal(shaped.value, noise.value)
    estimator = next(e for e in ESTIMATORS if e.name == "xattention-8")
    config = type(estimator.settings(0.5, 4096))(threshold=0.9)
    densities = [
        float(estimator.choose(x.query, x.key, config, 0.125, "auto")[0].density().mean())
        for x in (noise, shaped)
    ]
    assert densities[1] < 0.8 * densities[0]


def test_a_small_run_is_checked_and_complete():
    common = OpOptions(
        device="cpu",
        dtype="float32",
        lengths=(1024,),
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        budget_seconds=0.0,
    )
    options = BlockOptions(common, ("reference", "fa4"), "math", (0.5,), (0.4,))
    records = list(measure(options))
    assert {one.suite for one in records} == {"block"}
    names = {one.name for one in records}
    assert {"block/dense", "block/reference", "block/lists", "block/matmul"} <= names
    assert {f"estimate/{e.name}" for e in ESTIMATORS} <= names
    skipped = [one for one in records if one.kind == "skipped"]
    assert [one.name for one in skipped] == ["block/fa4"]
    assert "not on cpu" in skipped[0].note
    assert all(one.passed is not False for one in records), [one.note for one in records]


def test_what_cannot_be_measured_is_refused():
    plain = {"common": OpOptions(), "executors": (), "dense": "math"}
    with pytest.raises(UsageError, match=r"--executors must be among fa4, .*; got 'cuda'"):
        BlockOptions(**{**plain, "executors": ("cuda",)})
    with pytest.raises(UsageError, match=r"densities must be shares in \(0, 1\]"):
        BlockOptions(**plain, densities=(0.0,))
    with pytest.raises(UsageError, match="--lengths must be at least 256"):
        BlockOptions(OpOptions(lengths=(200,)), (), "math")
