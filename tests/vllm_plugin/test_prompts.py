"""The lengths of a step's prompts, as vLLM's two model runners hold them."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from token_sparse_attention.integrations.vllm import prompts
from token_sparse_attention.integrations.vllm.prompts import prompt_lengths, watch_runner


def first_runner():
    """V1's: its batch is an attribute, with room for more requests."""

    class Runner:
        input_batch = SimpleNamespace(num_reqs=2, num_prompt_tokens=np.array([5, 7, 9]))

        def execute_model(self, num_rows):
            return prompt_lengths(num_rows)

    prompts._watch(Runner, "execute_model", partial(prompts._during_step, noting=True))
    return Runner


def second_runner():
    """V2's: each step has a batch, whose rows are numbers of requests."""

    class Runner:
        req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([5, 6, 7, 8])))

        def execute_model(self, num_rows, dummy_run=False):
            if not dummy_run:
                self.prepare_attn(SimpleNamespace(num_reqs=2, idx_mapping_np=np.array([0, 2, 3])))
            return prompt_lengths(num_rows)

        def prepare_attn(self, batch):
            pass

    prompts._watch(Runner, "execute_model", partial(prompts._during_step, noting=False))
    prompts._watch(Runner, "prepare_attn", prompts._noting_rows)
    return Runner


@pytest.mark.parametrize("make", [first_runner, second_runner])
def test_lengths_are_known_while_a_step_runs(make):
    runner = make()()
    assert runner.execute_model(2) == runner.execute_model(num_rows=4) == [5, 7]
    assert runner.execute_model(1) is None, "a part of the step, whose rows are not known"
    assert prompt_lengths(2) is None


def test_a_dummy_run_has_no_prompts():
    runner = second_runner()()
    assert runner.execute_model(2) == [5, 7]
    assert runner.execute_model(2, dummy_run=True) is None


def test_a_runner_is_watched_once():
    runner = first_runner()
    before = runner.execute_model
    prompts._watch(runner, "execute_model", partial(prompts._during_step, noting=True))
    assert runner.execute_model is before


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("make", "name"), [(first_runner, "input_batch"), (second_runner, "req_states")]
)
def test_what_is_missing_is_named(make, name):
    runner = make()
    delattr(runner, name)
    with pytest.raises(
        RuntimeError, match=f"does not say how long .*Runner: .*has no attribute.*{name}"
    ):
        runner().execute_model(2)
    assert prompt_lengths(2) is None
    with pytest.raises(RuntimeError, match="Runner: it has no execute_step"):
        prompts._watch(runner, "execute_step", partial(prompts._during_step, noting=True))


@pytest.mark.vllm
def test_vllms_own_runners_have_what_is_read():
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.states import RequestState

    watch_runner(SimpleNamespace(use_v2_model_runner=True))
    watch_runner(SimpleNamespace(use_v2_model_runner=False))
    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert {"num_reqs", "idx_mapping_np"} <= fields
    assert "self.prompt_len = UvaBackedTensor(" in inspect.getsource(RequestState)
    assert "self.req_states.prompt_len.np" in inspect.getsource(GPUModelRunner)
    assert list(inspect.signature(GPUModelRunner.prepare_attn).parameters)[1] == "input_batch"
