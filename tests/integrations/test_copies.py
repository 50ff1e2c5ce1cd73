"""State that `apply` must not leave behind: in copies of a model, in compiled models."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import torch
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel

from integrations.models import CONFIG, LAYERS, SAMPLING, make_ids, make_image_model, make_model
from integrations.test_transformers import paths
from token_sparse_attention.integrations.transformers import apply


def test_a_deep_copy_is_what_the_model_was_before():
    for model in (make_model(), make_image_model()):
        ids = make_ids().clamp(max=190)
        dense = model(ids).logits
        with apply(model, SAMPLING) as report:
            sparse = model(ids).logits
            report.clear()
            twin = copy.deepcopy(model)
            assert torch.equal(twin(ids).logits, dense)
            assert len(report) == 0, "a copy's calls are not the model's"
            assert torch.equal(model(ids).logits, sparse)
            with apply(twin, SAMPLING) as of_twin:
                assert torch.equal(twin(ids).logits, sparse)
            assert len(of_twin) == LAYERS
        assert torch.equal(twin(ids).logits, dense)
        with apply(twin, SAMPLING):
            assert torch.equal(twin(ids).logits, sparse)
        assert twin.config.get_text_config()._attn_implementation == "sdpa"


def test_a_copy_does_not_keep_the_model_or_its_report():
    model = make_model()
    applied = apply(model, CONFIG)
    gone = weakref.ref(model), weakref.ref(applied.report)
    twin = copy.deepcopy(model)
    del model, applied
    gc.collect()
    assert [one() for one in gone] == [None, None]
    twin(make_ids())


def test_a_pickle_is_what_the_model_was_before():
    for model in (make_model(), make_image_model()):
        ids = make_ids().clamp(max=190)
        dense = model(ids).logits
        with apply(model, SAMPLING):
            sparse = model(ids).logits
            pickled = io.BytesIO()
            torch.save(model, pickled)
            pickled.seek(0)
            beside = torch.load(pickled, weights_only=False)
            assert torch.equal(beside(ids).logits, dense)
            assert torch.equal(model(ids).logits, sparse)
        pickled.seek(0)
        later = torch.load(pickled, weights_only=False)
        assert torch.equal(later(ids).logits, dense)
        with apply(later, SAMPLING):
            assert torch.equal(later(ids).logits, sparse)


def test_averaged_models_work():
    model, ids = make_model(), make_ids()
    dense = model(ids).logits
    with apply(model, CONFIG):
        averaged = AveragedModel(model)
        assert torch.equal(averaged(ids).logits, dense)
    assert torch.equal(averaged(ids).logits, dense)


def test_applying_again_compiles_nothing():
    """Nor do other settings: all applications share a name and a function."""
    model, ids = make_model(), make_ids()
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.reset()
    logits = []
    for number, config in enumerate((CONFIG, SAMPLING, CONFIG, SAMPLING)):
        counters.clear()
        with apply(compiled, config) as report:
            logits.append(compiled(ids).logits)
        assert paths(report) == [["sparse"]] * LAYERS
        assert (counters["frames"]["ok"] > 0) == (number == 0)
    torch._dynamo.reset()
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])
    assert not torch.equal(logits[0], logits[1])


def test_a_name_stays_registered_as_long_as_one_application_needs_it():
    first, second, ids = make_model(), make_model(), make_ids()
    one, two = apply(first, CONFIG), apply(second, CONFIG)
    assert one.name == two.name
    expected = second(ids).logits
    one.remove()
    assert torch.equal(second(ids).logits, expected)
    two.remove()
    assert not torch.equal(second(ids).logits, expected)
