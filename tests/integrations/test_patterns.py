"""Block-sparse patterns in a model: alone, and with token sparsity."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack, contextmanager

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attention.by_hand import HEADS, LITTLE, by_hand
from integrations.models import CONFIG, make_ids, make_model
from token_sparse_attention import AuxRequest, LayerProfile, token_sparse_attention
from token_sparse_attention.attention.patterns import FlexPrefillConfig, MInferenceConfig
from token_sparse_attention.attention.patterns.minference import load_head_budgets
from token_sparse_attention.integrations.transformers import (
    apply,
    attention_of_every_layer,
    register_dense_attention,
)

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
PROFILE = LayerProfile(
    base=dataclasses.replace(CONFIG, drop_mass=0.02),
    layers={1: {}, 2: {"budget": "per_head"}},
)


@pytest.fixture(scope="module")
def model():
    made = make_model()
    for layer in made.model.layers:  # else attention is so even that no block stands out
        layer.self_attn.q_proj.weight.data.mul_(8)
        layer.self_attn.k_proj.weight.data.mul_(8)
    return made


@contextmanager
def attention_by_hand(model, pattern, configs, everywhere):
    """Prefills by hand: the pattern on what `configs` selects, elsewhere on all or not at all.

    `pattern` may be a list with one for each layer.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module, query, key, value, mask, scaling=None, **options):
        config = configs.get(module.layer_idx)
        if query.shape[2] == 1 or (config is None and not everywhere):
            return sdpa(module, query, key, value, mask, scaling=scaling, **options)
        kept = torch.ones(*query.shape[1:3], dtype=torch.bool)
        if config is not None:
            _, selection, _ = token_sparse_attention(
                query, key, value, config, scale=scaling, return_aux=AuxRequest(selection=True)
            )
            chosen = selection.indices[0]
            kept = torch.stack(
                [
                    torch.zeros(query.shape[2]).bool().scatter(0, row[row >= 0], True)
                    for row in chosen
                ]
            )
        rest = torch.zeros_like(query)
        mine = pattern[module.layer_idx] if isinstance(pattern, list) else pattern
        out = by_hand((query, key, value), kept, mine, rest, scaling)
        return out.float().transpose(0, 1)[None].contiguous(), None

    AttentionInterface.register("by_hand", attend)
    AttentionMaskInterface.register("by_hand", sdpa_mask)
    model.set_attn_implementation("by_hand")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@pytest.fixture(scope="module")
def budget_file(tmp_path_factory):
    """A file of head budgets as published: a list of layers, an object of heads in each."""
    layers = [
        {
            str(head): ["vertical_and_slash", 3 + 2 * head + 7 * layer, 2 + head + layer, 0.1]
            for head in range(4)
        }
        for layer in range(3)
    ]
    layers[1]["2"] = ["stream_llm", 20, 40, 0.1]
    file = tmp_path_factory.mktemp("budgets") / "budgets.json"
    file.write_text(json.dumps(layers))
    return file


def in_layers(file):
    """The settings by a file of head budgets, and by hand those of each layer."""
    of_all = MInferenceConfig(layers=file, last_queries=16, sink_size=4, local_size=4)
    return of_all, [
        dataclasses.replace(of_all, layers=None, heads=heads) for heads in load_head_budgets(file)
    ]


@pytest.mark.parametrize("sparse", [False, True], ids=["alone", "with-token-sparsity"])
def test_each_layer_runs_its_own_head_budgets(model, budget_file, sparse):
    ids = make_ids(500)
    of_all, by_layer = in_layers(budget_file)
    configs = PROFILE.layer_configs(3) if sparse else {}
    with attention_by_hand(model, by_layer, configs, everywhere=True):
        expected = model(ids).logits
    with attention_by_hand(model, by_layer[0], configs, everywhere=True):
        same_for_all = model(ids).logits
    with ExitStack() as stack:
        stack.enter_context(running_on(model, register_dense_attention(of_all)))
        if sparse:
            stack.enter_context(apply(model, PROFILE, attention_backend=of_all))
        found = model(ids).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - same_for_all).abs().max() > 0.01
    with attention_of_every_layer(model, f'minference:{{"layers": "{budget_file}"}}'):
        # The defaults take the first columns and the nearest diagonals before any other.
        assert (model(ids).logits - found).abs().max() > 0.001


def test_head_budgets_must_be_of_the_model(model, budget_file):
    layers = load_head_budgets(budget_file)
    for bad, message in (
        (layers[:2], "an entry for each of the model's 3 layers, got 2"),
        ([*layers, layers[0]], "an entry for each of the model's 3 layers, got 4"),
        ([*layers[:2], layers[2][:3]], "layer 2: heads must hold .* the 4 query heads, got 3"),
    ):
        config = MInferenceConfig(layers=bad)
        with pytest.raises(ValueError, match=message):
            apply(model, CONFIG, attention_backend=config)
        with pytest.raises(ValueError, match=message), attention_of_every_layer(model, config):
            pass
        message = message.removeprefix("layer 2: ")
        with (
            running_on(model, register_dense_attention(config)),
            pytest.raises(ValueError, match=message),
        ):
            model(make_ids(300))
    assert model.config._attn_implementation == "sdpa"


@contextmanager
def running_on(model, implementation):
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("pattern", LITTLE.values(), ids=LITTLE)
def test_a_pattern_alone(model, pattern):
    ids = make_ids(500)
    dense = model(ids).logits
    with attention_by_hand(model, pattern, {}, everywhere=True):
        expected = model(ids, use_cache=True)
        expected_next = model(ids[:, :1], past_key_values=expected.past_key_values).logits
    with running_on(model, register_dense_attention(pattern)):
        found = model(ids, use_cache=True)
        found_next = model(ids[:, :1], past_key_values=found.past_key_values).logits
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(found_next, expected_next, **CLOSE)
    assert (found.logits - dense).abs().max() > 0.01
    assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("everywhere", [False, True], ids=["sparse-layers", "all-layers"])
@pytest.mark.parametrize("pattern", LITTLE.values(), ids=LITTLE)
def test_a_pattern_with_token_sparsity(model, pattern, everywhere):
    ids = make_ids(700)
    with attention_by_hand(model, pattern, PROFILE.layer_configs(3), everywhere):
        expected = model(ids).logits
    name = register_dense_attention(pattern) if everywhere else "sdpa"
    with running_on(model, name), apply(model, PROFILE, attention_backend=pattern) as report:
        found = model(ids).logits
    assert [record.paths for record in report] == [["dense"], ["sparse"], ["sparse"]]
    torch.testing.assert_close(found, expected, **CLOSE)
    with apply(model, PROFILE):
        assert (model(ids).logits - found).abs().max() > 0.01, "without the pattern it differs"


def test_the_pattern_of_every_layer_is_for_a_while(model):
    ids = make_ids(500)
    dense = model(ids).logits
    pattern = LITTLE["streaming"]
    with running_on(model, register_dense_attention(pattern)):
        expected = model(ids).logits
    before = model.config._attn_implementation
    with attention_of_every_layer(model, pattern):
        assert torch.equal(model(ids).logits, expected)
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, dense)
    with pytest.raises(TypeError, match="model must be"), attention_of_every_layer(3, pattern):
        pass


def test_padded_rows_of_a_model_on_a_pattern_stay_dense(model):
    ids, mask = make_ids(500, batch=2), torch.ones(2, 500, dtype=torch.long)
    mask[0, :60] = 0
    dense = model(ids, attention_mask=mask).logits
    with running_on(model, register_dense_attention(LITTLE["streaming"])):
        assert torch.equal(model(ids, attention_mask=mask).logits, dense)


def test_a_second_turn_runs_the_pattern(model):
    """Streaming blocks do not depend on later queries, so two chunks are one prompt."""
    ids = make_ids(640)
    with running_on(model, register_dense_attention(LITTLE["streaming"])):
        whole = model(ids).logits[:, 384:]
        first = model(ids[:, :384], use_cache=True)
        second = model(ids[:, 384:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(second, whole, **CLOSE)


def test_other_settings_have_another_name():
    names = [
        register_dense_attention(backend)
        for backend in (
            "flexprefill",
            FlexPrefillConfig(),
            'flexprefill:{"gamma": 0.5}',
            FlexPrefillConfig(gamma=0.5),
            FlexPrefillConfig(gamma=0.6),
            HEADS,
        )
    ]
    assert names[0] == names[1] == "dense_flexprefill"
    assert names[2] == names[3]
    assert len(set(names)) == 4
    for name in names:  # which transformers would read
        assert not any(part in name for part in ("flash", "sdpa", ":", "/", "|"))
    for call in (
        register_dense_attention,
        lambda name: apply(None, CONFIG, attention_backend=name),
    ):
        with pytest.raises(ValueError, match="did you mean 'xattention'"):
            call("xatention")


def test_a_compiled_model_runs_the_pattern(model):
    ids, pattern = make_ids(500), LITTLE["flexprefill"]
    with running_on(model, register_dense_attention(pattern)):
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager")(ids).logits
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, expected, **CLOSE)
