"""The benchmarks run end to end on a CPU, and their checks notice what is wrong."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from support import with_selection
from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig
from token_sparse_attention.benchmark import checks, op, timing
from token_sparse_attention.benchmark.checks import Inputs, check_dense, check_sparse, judge
from token_sparse_attention.benchmark.contenders import dense_call, eager_composition
from token_sparse_attention.benchmark.options import OpOptions
from token_sparse_attention.benchmark.record import ResultFile
from token_sparse_attention.cli import main
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.methods import sampling

CPU = torch.device("cpu")
CONFIG = TokenSelectionConfig(observation_window=16, min_tokens=32)
OP = ["bench", "op", "--device", "cpu", "--dtype", "float32", "--budget-seconds", "0.001"]
OP += ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--lengths", "1280"]
OP += ["--crossover-lengths", "1280", "--drop-mass", "0.3", "--kept", "0.5"]
PREFILL = ["bench", "prefill", "--device", "cpu", "--dtype", "float32", "--lengths", "1280"]
PREFILL += ["--kept", "0.5", "--layers", "2", "--hidden", "64", "--intermediate", "96"]
PREFILL += ["--samples", ""]
PREFILL += ["--vocab", "199", "--heads", "4", "--kv-heads", "2", "--budget-seconds", "0.001"]


def make_inputs(seq_len=300):
    options = OpOptions(device="cpu", dtype="float32", num_heads=4, num_kv_heads=2, head_dim=16)
    return op._make_inputs(options, seq_len)


def test_op_measures_everything(tmp_path, capsys):
    assert main([*OP, "--out", str(tmp_path / "op.json"), "--json"]) == 0
    printed = ResultFile.from_json(capsys.readouterr().out)
    assert printed == ResultFile.load(tmp_path / "op.json")
    assert printed.provenance["versions"]["torch"] == torch.__version__
    assert printed.arguments["lengths"] == [1280]
    names = {record.name for record in printed.records}
    assert names == {
        *("dense/flash", "dense/math", "eager/whole", "crossover/dense", "crossover/ours"),
        *("ours/score", "ours/select", "ours/gather", "ours/attend", "ours/scatter"),
        *("ours/whole", "ours/whole_window", "ours/unchunked", "ours/window"),
        "sampling/whole",
    }
    assert {record.kind for record in printed.records} == {"eager", "first_call"}
    for record in printed.records:
        assert record.samples >= timing.MIN_SAMPLES
        if record.kind == "eager":
            assert 0 < record.low_ms <= record.median_ms <= record.high_ms
    checked = {record.name for record in printed.records if record.passed}
    assert {
        "dense/flash",
        "ours/whole",
        "eager/whole",
        "crossover/ours",
        "sampling/whole",
    } <= checked


def test_op_prints_tables_for_people(capsys):
    assert main(OP) == 0
    printed = capsys.readouterr().out
    (whole,) = [line for line in printed.splitlines() if " ours/whole " in line and "x" in line]
    assert re.search(r"\d\.\d\dx", whole)
    assert "check failed" not in printed


def test_prefill_measures_dense_and_sparse(capsys):
    assert main([*PREFILL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["kept"], r["passed"]) for r in result["records"]] == [
        ("dense", None, True),
        ("sparse/half", 0.5, True),
        ("sparse/all", 0.5, True),
    ]
    assert all(r["median_ms"] > 0 for r in result["records"])


def test_prefill_measures_kv_sampling(capsys, monkeypatch):
    switched_on = []

    def watched(model, config, **options):
        switched_on.append(config)
        return apply(model, config, **options)

    monkeypatch.setattr("token_sparse_attention.benchmark.prefill.apply", watched)
    arguments = [*PREFILL, "--samples", "64", "--kept", "", "--lengths", "1280,2304", "--json"]
    assert main(arguments) == 0
    records = json.loads(capsys.readouterr().out)["records"]
    assert [(r["name"], r["seq_len"], r["kind"]) for r in records] == [
        ("dense", 1280, "eager"),
        ("samples-64/half", 1280, "skipped"),
        ("samples-64/all", 1280, "skipped"),
        ("dense", 2304, "eager"),
        ("samples-64/half", 2304, "eager"),
        ("samples-64/all", 2304, "eager"),
    ]
    assert records[1]["note"] == "no longer than window and sinks: 2,052 tokens"
    assert all(r["passed"] for r in records if r["kind"] == "eager")
    half, every = switched_on[-2:]
    assert half == KVSamplingConfig(num_samples=64, sparse_layers=(1,), crossover="off")
    assert every.sparse_layers == (0, 1)
    assert switched_on[0] == TokenSelectionConfig(sparse_layers=(0, 1), keep_ratio=1.0)


def test_prefill_checks_kv_sampling_by_sampling_every_key(capsys, monkeypatch):
    def wrong(model, config, **options):
        if isinstance(config, KVSamplingConfig):
            config = dataclasses.replace(config, num_samples=1)
        return apply(model, config, **options)

    arguments = [*PREFILL, "--samples", "64", "--kept", "", "--lengths", "2304", "--json"]
    monkeypatch.setattr("token_sparse_attention.benchmark.prefill.apply", wrong)
    assert main(arguments) == 1
    records = json.loads(capsys.readouterr().out)["records"]
    assert not any(r["passed"] for r in records)


@pytest.mark.parametrize("arguments", [OP, PREFILL], ids=["op", "prefill"])
def test_a_failed_check_exits_1_and_makes_no_ratio(arguments, capsys, monkeypatch):
    monkeypatch.setattr(checks, "exact_rows", lambda *given: torch.ones(len(given[2]), 1))
    wrong = checks.Verdict(False, 1.0, "wrong")
    monkeypatch.setattr("token_sparse_attention.benchmark.prefill.judge", lambda *_: wrong)
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "check failed" in printed
    assert "x)" not in printed


@pytest.mark.parametrize("kept", [0.3, 1.0])
def test_the_eager_composition_is_the_method(kept):
    inputs = make_inputs()
    out, selection = eager_composition(inputs, CONFIG, kept)
    config = dataclasses.replace(CONFIG, keep_ratio=kept)
    expected, ours = with_selection(inputs, config)
    torch.testing.assert_close(out, expected)
    assert torch.equal(selection.lengths, ours.lengths)
    assert check_sparse(inputs, out, selection, config, reference_error=1e-6).passed


@pytest.mark.parametrize("fallback", ["zero", "window"])
def test_checks_notice_what_is_wrong(fallback):
    config = dataclasses.replace(CONFIG, fallback=fallback, sliding_window=20)
    inputs = make_inputs()
    out, selection = with_selection(inputs, dataclasses.replace(config, keep_ratio=0.5))

    def passes(out=out, selection=selection, kept=0.5):
        against = dataclasses.replace(config, keep_ratio=kept)
        return check_sparse(inputs, out, selection, against, reference_error=1e-6).passed

    assert passes()
    assert not passes(out * 1.001)
    assert not passes(out * float("nan"))
    assert not passes(kept=0.6), "the size is checked"
    dropped = torch.ones(300, dtype=torch.bool)
    dropped[selection.indices[0, 0]] = False
    changed = out.clone()
    changed[0, 0, dropped] += 1
    assert not passes(changed), "dropped rows are checked"
    worse = selection.indices.clone()
    worse[0, 0, :-16] = (~dropped).logical_not().nonzero()[: worse.shape[2] - 16, 0]
    rerun = eager_with(inputs, worse)
    assert not passes(rerun, selection._replace(indices=worse)), "the mass kept is checked"
    dense = selection._replace(ran_sparse=torch.tensor([False]))
    assert not passes(dense_call("math", inputs)(), dense), "what was to be sparse ran dense"
    assert passes(dense_call("math", inputs)(), dense, kept=None)


SELECTION = dataclasses.replace(
    CONFIG, drop_mass=0.3, fallback="window", sliding_window=20, dense_queries=40
)
SAMPLING = KVSamplingConfig(
    block_size=16,
    num_probes=8,
    sliding_window=20,
    sink_size=2,
    num_samples=30,
    dense_queries=40,
    crossover="off",
)


@pytest.mark.parametrize("config", [SELECTION, SAMPLING], ids=["selection", "sampling"])
@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_checks_notice_wrong_samples_windows_and_dense_queries(config, budget, monkeypatch):
    other = SAMPLING if config is SELECTION else SELECTION
    config = dataclasses.replace(config, budget=budget)
    inputs = make_inputs()

    def passes(out, selection, against=config):
        return check_sparse(inputs, out, selection, against, reference_error=1e-6).passed

    out, selection = with_selection(inputs, config)
    assert selection.ran_sparse.all()
    assert passes(out, selection)
    wrong = [{"dense_queries": 0}, {"dense_queries": 41}, {"sliding_window": 21}]
    if other is SELECTION:
        wrong += [{"num_samples": 20}, {"sink_size": 3}]
    changed = [dataclasses.replace(config, **change) for change in wrong]
    for one in (*changed, dataclasses.replace(other, budget=budget)):
        assert not passes(with_selection(inputs, one)[0], selection), one
    for query in (-1, -40, -41, 0):
        changed = out.clone()
        changed[0, 0, query] *= 1.001
        assert not passes(changed, selection), query
    if config.method == "kv_sampling":
        real = sampling.sample

        def unweighted(*given):
            keys = real(*given)
            return keys._replace(log_weights=torch.zeros_like(keys.log_weights))

        with monkeypatch.context() as patch:
            patch.setattr(sampling, "sample", unweighted)
            out, _ = with_selection(inputs, config)
        assert not passes(out, selection), "weights are checked"


def eager_with(inputs, indices):
    """Attention over given slots, zeros elsewhere."""
    out = torch.zeros_like(inputs.query)
    for head, slots in enumerate(indices[0]):
        rows = checks.exact_rows(inputs, head, slots, slots)
        out[0, head, slots] = rows.float()
    return out


def test_dense_checks():
    inputs = make_inputs()
    out = dense_call("flash", inputs)()
    assert check_dense(inputs, out).passed
    assert not check_dense(inputs, out + 0.01).passed
    assert judge(float("nan"), 1.0) == checks.Verdict(
        False, None, "relative error nan exceeds 1.00e+00"
    )


def test_inputs_lie_as_models_give_them():
    inputs = make_inputs()
    assert isinstance(inputs, Inputs)
    for tensor in inputs:
        assert tensor.transpose(1, 2).is_contiguous()
    assert torch.equal(make_inputs().query, inputs.query)


def test_times_are_medians_with_their_spread():
    taken = timing.summarize("eager", [5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (taken.median_ms, taken.low_ms, taken.high_ms, taken.samples) == (3.5, 2.0, 5.0, 6)
    assert timing.summarize("eager", [2.0])[1:5] == (2.0, 2.0, 2.0, 1)
    calls = []
    timing.kernel_times([lambda: calls.append("a"), lambda: calls.append("b")], CPU, 0.0)
    assert calls == ["a", "b"] * (1 + timing.MIN_SAMPLES), "they take turns"
    assert timing._untimed([0.25, 0.025, 0.001]) == [1, 4, 100], "a tenth of a second each"
    assert timing._untimed([0.019, 0.001]) == [0, 0]


def test_a_peer_that_cannot_run_is_noted(capsys):
    assert main([*OP, "--backends", "cudnn,flash", "--json"]) == 0
    records = ResultFile.from_json(capsys.readouterr().out).records
    (skipped,) = (record for record in records if record.kind == "skipped")
    assert skipped.name == "dense/cudnn"
    assert skipped.note.startswith("ValueError: attention_backend 'cudnn' cannot run")


def test_slow_peers_end_early(capsys):
    assert main([*OP, "--peers-up-to", "1000", "--backends", "math,flash", "--json"]) == 0
    names = {record.name for record in ResultFile.from_json(capsys.readouterr().out).records}
    assert "dense/math" in names
    assert not {"dense/flash", "eager/whole"} & names


def test_very_long_points_are_few(capsys, monkeypatch):
    monkeypatch.setattr(op, "_FULL_UP_TO", 1000)
    assert main([*OP, "--crossover-lengths", "", "--json"]) == 0
    records = ResultFile.from_json(capsys.readouterr().out).records
    assert [record.name for record in records] == ["dense/flash", "ours/whole"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*OP, "--heads", "3"], "--heads must be a multiple of --kv-heads 2, got 3"),
        ([*OP, "--backends", "abacus"], "--backends must be among"),
        ([*OP, "--lengths", "64"], "lengths must exceed 128, got 64"),
        ([*OP, "--kept", "0.5,1.5"], "--kept must hold shares in (0, 1]"),
        ([*OP, "--kept", ""], "--kept must hold shares in (0, 1]"),
        ([*OP, "--drop-mass", "0"], "--drop-mass must hold shares in (0, 1)"),
        ([*OP, "--device", "abacus"], "--device abacus cannot be used"),
        ([*OP, "--out", "/dev/null/x.json"], "--out /dev/null/x.json cannot be written"),
        ([*PREFILL, "--hidden", "63"], "--hidden must be a multiple of --heads"),
        ([*PREFILL, "--kept", "0"], "--kept must hold shares in (0, 1]"),
    ],
)
def test_bad_input_exits_2_and_names_it(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tsa: ")
    assert message in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench"],
        ["bench", "fly"],
        [*OP, "--lengths", "4K"],
        [*PREFILL, "--lengths", ""],
        [*OP, "--lengths", "-1"],
        [*OP, "--dtype", "int8"],
    ],
)
def test_bad_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: tsa bench" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["op", "prefill"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"example:\n  tsa bench {command}" in printed
    assert "--json" in printed
