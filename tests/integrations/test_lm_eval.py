"""lm-eval's model ``tsa``: the answers of its ``hf`` where all is seen, others where not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from evaluation.small import make_samples, save_model
from token_sparse_attention import KVSamplingConfig, LayerProfile
from token_sparse_attention.errors import JobFailedError, UsageError
from token_sparse_attention.integrations.transformers import apply

pytest.importorskip("datasets")
lm_eval = pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from token_sparse_attention.integrations import lm_eval as integration  # noqa: E402
from token_sparse_attention.integrations.lm_eval import SparseHFLM  # noqa: E402

BLOCKS = {"block_size": 16, "num_probes": 8, "sliding_window": 16, "crossover": "off"}
WINDOWS = KVSamplingConfig(**BLOCKS, sink_size=0, num_samples=1, dense_queries=0)
ALL = {"method": "kv_sampling", **BLOCKS, "num_samples": 4096}
REPLIES = """
task: replies
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: 1
doc_to_choice: ["one", "seven", "eleven"]
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with tasks of lm-eval."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"prompt": s.prompt, "answer": str(s.index)} for s in make_samples().samples]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("replies", REPLIES), ("choices", CHOICES)):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(folder / "rows.jsonl")))
    return folder


def evaluated(lm, tasks, names=("replies", "choices")):
    """What lm-eval scores, and the answers that it scores."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    done = lm_eval.simple_evaluate(
        lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    answers = {name: [one["resps"] for one in done["samples"][name]] for name in names}
    return done["results"], answers


def loaded(kind, model, **options):
    return kind(model, device="cpu", dtype="float32", **options)


@pytest.fixture(scope="module")
def dense(model, tasks):
    return evaluated(loaded(HFLM, model), tasks)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_settings_that_see_everything_score_as_hf_does(model, tasks, dense, batch_size):
    names = ("replies", "choices") if batch_size == 1 else ("replies",)
    lm = loaded(SparseHFLM, model, sparse_config=ALL, batch_size=batch_size)
    scores, answers = evaluated(lm, tasks, names)
    assert scores == {name: dense[0][name] for name in names}
    assert answers["replies"] == dense[1]["replies"]
    assert all(record.paths == ["sparse"] * len(record.paths) for record in lm.report)
    assert lm.report.decode_calls
    for sparse, exact in zip(answers.get("choices", []), dense[1]["choices"]):
        values = [[float(choice[0][0]) for choice in of] for of in (sparse, exact)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)


def test_settings_that_do_not_answer_as_apply_does(model, tasks, dense):
    lm = loaded(SparseHFLM, model, sparse_config=LayerProfile(WINDOWS, {0: {}, 2: {}}))
    _, answers = evaluated(lm, tasks)
    assert answers["replies"] != dense[1]["replies"]
    assert answers["choices"] != dense[1]["choices"]
    assert {record.layer for record in lm.report if "sparse" in record.paths} == {0, 2}

    plain = loaded(HFLM, model)
    with apply(plain.model, LayerProfile(WINDOWS, {0: {}, 2: {}})):
        assert evaluated(plain, tasks)[1] == answers


def test_prompts_that_all_run_dense_are_an_error_that_says_why(model, tasks):
    lm = loaded(SparseHFLM, model)  # windows of 2,048 tokens
    for name in ("replies", "choices"):
        with pytest.raises(JobFailedError, match=r"no layer ran sparse .*: context too short"):
            evaluated(lm, tasks, [name])


def test_one_sparse_prompt_is_enough(model, tasks):
    """Requests go from the longest to the shortest; the report knows the last one."""
    path = tasks / "rows.jsonl"
    longest, shortest = (
        path.read_text().splitlines()[0],
        json.dumps({"prompt": "The number", "answer": ""}),
    )
    folder = tasks / "two"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(f"{shortest}\n{longest}")
    text = REPLIES.replace("FILE", str(folder / "rows.jsonl"))
    (folder / "replies.yaml").write_text(text)
    lm = loaded(SparseHFLM, model, sparse_config=WINDOWS)
    evaluated(lm, folder, ["replies"])
    assert {path for record in lm.report for path in record.paths} == {"sparse", "dense"}
    assert lm.report.last_prefill()[0].paths == ["dense"]


def test_padded_log_likelihoods_are_refused(model, tasks):
    lm = loaded(SparseHFLM, model, sparse_config=WINDOWS, batch_size=2)
    with pytest.raises(UsageError, match="batch_size must be 1 for log-likelihoods, got 2"):
        evaluated(lm, tasks, ["choices"])


def test_settings_are_read_as_the_commands_read_them(model):
    with pytest.raises(UsageError, match=r"sparse_config publishd cannot be used.*'published'"):
        SparseHFLM("no/such/model", sparse_config="publishd")
    with pytest.raises(UsageError, match=r"token_sparse_profile.json"):
        loaded(SparseHFLM, model, sparse_config="profile")
    with pytest.raises(UsageError, match="did you mean 'num_samples'"):
        loaded(SparseHFLM, model, sparse_config={"num_sample": 3})
    with pytest.raises(ValueError, match="impl must be one of"):
        loaded(SparseHFLM, model, impl="magic")


def test_registering_again_changes_nothing():
    from lm_eval.api.registry import get_model

    for _ in range(2):
        integration.register()
        assert get_model("tsa") is SparseHFLM


def arguments(model, tasks, config):
    given = ["run", "--model", "tsa", "--tasks", "replies", "--include_path", str(tasks)]
    given += ["--device", "cpu", "--model_args", f"pretrained={model}", "dtype=float32"]
    return [*given, f"sparse_config={config}"]


def test_the_command_is_lm_evals(model, tasks):
    command = [sys.executable, "-m", "token_sparse_attention.integrations.lm_eval"]
    command += arguments(model, tasks, WINDOWS.text)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    assert done.returncode == 0, done.stderr
    assert "|replies|" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ("default", 1, "tsa: no layer ran sparse in any prompt: context too short"),
        ("publishd", 2, "tsa: sparse_config publishd cannot be used"),
    ],
)
def test_the_command_says_what_is_wrong(monkeypatch, capsys, model, tasks, config, code, said):
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments(model, tasks, config)])
    assert integration.main() == code
    assert said in capsys.readouterr().err
