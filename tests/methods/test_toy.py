"""A method from outside the package runs everywhere that the package's own do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from support import (
    WITH_BOTH,
    Problem,
    causal_attention,
    make_problem,
    relative_error,
    with_selection,
)
from token_sparse_attention import (
    DenseReason,
    Execution,
    LayerProfile,
    Method,
    SparseConfig,
    config_from_json,
    load_config,
    token_sparse_attention,
)
from token_sparse_attention.config import config_from_dict
from token_sparse_attention.custom_op import settings_text
from token_sparse_attention.gate import reason_of
from token_sparse_attention.methods import method_of
from token_sparse_attention.profile import layer_configs
from toy_method import Toy, ToyConfig

CONFIG = ToyConfig(width=20)


def window_attention(problem, width):
    return causal_attention(*problem, scale=0.25, window=width)


@pytest.mark.parametrize(("query_len", "kv_len"), [(150, 150), (60, 150), (1, 40)])
def test_it_attends_to_its_window(query_len, kv_len):
    problem = make_problem(query_len=query_len, kv_len=kv_len)
    out, selection = with_selection(problem, CONFIG)
    assert selection.ran_sparse.tolist() == [True]
    assert selection.lengths.tolist() == [[0] * 4]
    assert torch.equal(out, window_attention(problem, 20))
    dense = causal_attention(*problem, scale=0.25)
    assert relative_error(out, dense) > 1e-2


def test_short_prompts_run_dense():
    problem = make_problem(query_len=20)
    out, selection = with_selection(problem, CONFIG)
    assert torch.equal(out, causal_attention(*problem, scale=0.25))
    assert reason_of(int(selection.reasons[0])) is DenseReason.SHORT_CONTEXT


def test_what_every_method_has_it_has_too():
    """Dense queries, dense heads, the log-sum-exp, padding."""
    problem = make_problem(batch=3, query_len=150)
    mask = torch.ones(3, 150, dtype=torch.bool)
    mask[1, :30] = False
    mask[2, :135] = False
    config = dataclasses.replace(CONFIG, dense_queries=11, dense_heads=(2,))
    result = token_sparse_attention(*problem, config, padding_mask=mask, return_aux=WITH_BOTH)
    assert result.selection.ran_sparse.tolist() == [True, True, False]
    assert result.lse.shape == (3, 4, 150)
    for number, start in enumerate((0, 30, 135)):
        alone = Problem(*(x[number : number + 1, :, start:] for x in problem))
        dense, windows = causal_attention(*alone, scale=0.25), window_attention(alone, 20)
        out = result.output[number : number + 1, :, start:]
        torch.testing.assert_close(out[:, 2], dense[:, 2])
        torch.testing.assert_close(out[:, :, -11:], dense[:, :, -11:])
        others = [0, 1, 3]
        torch.testing.assert_close(out[:, others, :-11], windows[:, others, :-11])
        assert not result.output[number, :, :start].any()


@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_it_is_compiled_into_one_graph(backend):
    torch.compiler.reset()
    problem = make_problem(query_len=150)
    compiled = torch.compile(token_sparse_attention, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(*problem, CONFIG), window_attention(problem, 20))
    result = compiled(*problem, CONFIG, return_aux=WITH_BOTH)
    assert result.selection.lengths.tolist() == [[0] * 4]
    assert result.lse.isfinite().all()


def test_its_operator_keeps_what_compilers_assume():
    problem = make_problem(batch=2, query_len=90, kv_len=120)
    settings = settings_text(Execution().text, CONFIG.text)
    arguments = (*problem, None, [], settings, 0.25, "1111")
    torch.library.opcheck(torch.ops.token_sparse_attention.prefill.default, arguments)


def test_settings_travel_as_json(tmp_path):
    assert config_from_dict({"method": "toy"}).method == "toy"
    for text in (CONFIG.text, CONFIG.to_json()):
        assert config_from_json(text) == CONFIG
    profile = LayerProfile(CONFIG, {1: {}, 3: {"width": 7}})
    assert LayerProfile.from_json(profile.to_json()) == profile
    file = tmp_path / "toy.json"
    file.write_text(profile.to_json())
    assert layer_configs(load_config(file), 4) == {1: CONFIG, 3: ToyConfig(width=7)}
    with pytest.raises(ValueError, match="did you mean 'width'"):
        config_from_json('{"method": "toy", "widht": 3}')
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ToyConfig(width=0)


def test_it_reports_its_work():
    method = method_of(CONFIG)
    assert isinstance(method, Toy)
    assert method.work(0, 100) == pytest.approx((20 * 21 / 2 + 80 * 20) / (100 * 101 / 2))


def test_a_config_without_a_method_is_named():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Lonely(SparseConfig, method="lonely"):
        """Settings that no method is for."""

    with pytest.raises(TypeError, match=r"one that a Method is registered for, got .*Lonely"):
        token_sparse_attention(*make_problem(query_len=50), Lonely())


def test_a_method_must_say_what_it_does():
    class Half(Method[ToyConfig], config=type("Unused", (ToyConfig,), {}, method="unused")):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half(CONFIG)
