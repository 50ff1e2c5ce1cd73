"""Every family in every mode: equal to dense, equal to the oracle, and what the table says."""

from __future__ import annotations

import json
import re
import threading
import warnings

import pytest
import torch
import transformers

from integrations.families import FAMILIES
from integrations.matrix import (
    COPIES,
    EVERYTHING,
    FOLDER,
    LENGTH,
    MODES,
    RESULT,
    TRAINING,
    dense,
    family_model,
    generated,
    measure,
    model_for,
    padded,
    whole_logits,
)
from integrations.models import CONFIG, SAMPLING, make_ids, oracle
from token_sparse_attention import DenseReason
from token_sparse_attention.integrations.transformers import apply

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
REAL = {"kv_sampling": SAMPLING, "token_selection": CONFIG}
KNOWN = RESULT if RESULT.exists() else max(FOLDER.glob("*.json"))
COMMITTED = json.loads(KNOWN.read_text(encoding="utf-8"))
measured = pytest.mark.skipif(KNOWN != RESULT, reason=f"{RESULT.name} was not measured")
SERVED = [family for family, kinds in COMMITTED["families"].items() if "refused" not in kinds]
SPARSE = [family for family in SERVED if "sparse" in COMMITTED["families"][family].values()]
COMPILED = ("Gemma3Text",)
SOME = ("Llama", "Gemma3Text", "Lfm2", "Qwen3Next", "DiffLlama", "FalconH1")


@pytest.fixture(autouse=True)
def _quiet():
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


def assert_same(given, expected):
    assert len(given) == len(expected)
    for mine, others in zip(given, expected):
        if isinstance(mine, str):
            assert mine == others
        else:
            torch.testing.assert_close(mine, others, **CLOSE)


@measured
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_is_measured(family):
    assert measure(family) == COMMITTED["families"][family], (
        "run PYTHONPATH=tests python -m integrations.matrix, then python -m benchmarks.pages"
    )


def test_the_table_lists_every_family_and_mode():
    assert list(COMMITTED["families"]) == list(FAMILIES)
    assert list(COMMITTED["not_offered"]) == list(MODES)
    root = FOLDER.parents[2]
    for file, pin in (("constraints.txt", "transformers=="), ("Makefile", "_TRANSFORMERS = ")):
        pins = re.findall(f"^.*{pin}([0-9.]+)$", (root / file).read_text("utf-8"), re.MULTILINE)
        assert pins
        assert all((FOLDER / f"transformers-{pin}.json").exists() for pin in pins)
    assert len(SERVED) >= 25


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in TRAINING])
@pytest.mark.parametrize("family", SERVED)
def test_settings_that_see_everything_equal_dense(family, mode):
    model, expected = model_for(family, mode), dense(family, mode)
    for config in EVERYTHING.values():
        if isinstance(expected, Exception):
            with pytest.raises(type(expected)), apply(model, config):
                MODES[mode](model)
            continue
        with apply(model, config) as report:
            assert_same(MODES[mode](model), expected)
        ran = {path for record in report for path in record.paths}
        assert ("sparse" in ran) == (family in SPARSE and mode not in COPIES)


@pytest.mark.parametrize("mode", TRAINING)
@pytest.mark.parametrize("family", SERVED)
def test_training_is_dense(family, mode):
    """Also where the forward pass records no gradients, and the backward pass computes it anew."""
    model, expected = model_for(family, mode), dense(family, mode)
    assert not isinstance(expected, Exception)
    for config in REAL.values():
        with apply(model, config) as report, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "token sparse attention ran dense")
            assert_same(MODES[mode](model), expected)
        reasons = {record.dense_reason for record in report}
        assert None not in reasons
        assert DenseReason.GRADIENTS in reasons or family not in SPARSE


@measured
@pytest.mark.parametrize("mode", MODES)
def test_modes_that_transformers_does_not_offer_are_the_tables(mode):
    assert COMMITTED["not_offered"][mode] == [
        family for family in SERVED if isinstance(dense(family, mode), Exception)
    ]


@pytest.mark.parametrize("method", REAL)
@pytest.mark.parametrize("family", SERVED)
def test_settings_that_sample_equal_the_oracle(family, method):
    """Of each layer that ran sparse; the others are the model's own, and say why."""
    model, given = family_model(family), padded("left")
    real = given["attention_mask"].bool()

    def run():
        return [model(**given).logits[real], *generated(model, make_ids(LENGTH))]

    expected = run()
    with apply(model, REAL[method]) as report:
        sparse = run()
    assert torch.equal(model(**given).logits[real], expected[0]), "removed without a trace"
    layers = {record.layer for record in report if "sparse" in record.paths}
    for record in report:
        assert record.layer in layers or isinstance(record.dense_reason, DenseReason)
    if family in SPARSE:
        assert (sparse[0] - expected[0]).norm() > 1e-4 * expected[0].norm()
        with oracle(model, REAL[method], layers):
            expected = run()
    assert_same(sparse, expected)


@pytest.mark.parametrize("family", COMPILED)
def test_compiled_families_equal_themselves(family):
    model = family_model(family)
    compiled = torch.compile(model, backend="eager")
    with apply(model, SAMPLING):
        expected = whole_logits(model)
    with apply(compiled, SAMPLING) as report:
        assert_same(whole_logits(compiled), expected)
    torch._dynamo.reset()
    assert ("sparse" in {path for one in report for path in one.paths}) == (family in SPARSE)


class InStep:
    """Holds back two threads in a layer until both have begun their forward passes."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=60)

    def __call__(self, *_):
        self.barrier.wait()


@pytest.mark.parametrize("family", SOME)
def test_threads_do_not_see_each_others_passes(family):
    """One reads a prompt in chunks, one verifies drafts with padding."""
    model = family_model(family)
    ids, given = make_ids(2 * LENGTH), padded("left")

    def in_chunks():
        first = model(ids[:, :LENGTH], use_cache=True)
        return model(ids[:, LENGTH:], past_key_values=first.past_key_values).logits

    def drafts():
        model(**given, logits_to_keep=9)
        return model(**given, logits_to_keep=9).logits

    results = {}

    def run(work, alone):
        with torch.no_grad():
            results[work, alone] = work()

    with apply(model, SAMPLING) as report:
        for work in (in_chunks, drafts):
            run(work, True)
        alone = sorted(map(pass_of, report.prefills()))
        report.clear()
        first = next(one for one in model.modules() if getattr(one, "layer_idx", None) == 0)
        hook = first.register_forward_pre_hook(InStep())
        threads = [threading.Thread(target=run, args=(w, False)) for w in (in_chunks, drafts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
        assert sorted(map(pass_of, report.prefills())) == alone
    for work in (in_chunks, drafts):
        torch.testing.assert_close(results[work, False], results[work, True])


def pass_of(records):
    return [(one.layer, one.query_len, one.kv_len, one.paths, str(one.kept)) for one in records]


@pytest.mark.parametrize("family", SOME)
def test_a_pass_that_fails_leaves_nothing_behind(family):
    model, ids = family_model(family), make_ids(LENGTH)
    expected = whole_logits(model)
    decoder = model.get_decoder()

    def fail(*_):
        raise KeyError("a layer fails")

    with apply(model, SAMPLING):
        sparse = decoder(ids)[0]
        hook = model.get_output_embeddings().register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="a layer fails"):
            model(ids, logits_to_keep=9)
        hook.remove()
        assert torch.equal(decoder(ids)[0], sparse), "the failed call's drafts are not this one's"
        hook = model.get_output_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="a layer fails"), apply(model, SAMPLING):
        model(ids)
    hook.remove()
    assert_same(whole_logits(model), expected)
    assert not model._forward_hooks
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_a_layer_that_attends_twice_is_one_layer_of_one_pass():
    model, ids = family_model("DiffLlama"), make_ids(LENGTH)
    with apply(model, SAMPLING) as report:
        model(ids)
        model(ids)
    assert [[record.layer for record in one] for one in report.prefills()] == [
        [0, 0, 1, 1, 2, 2]
    ] * 2
