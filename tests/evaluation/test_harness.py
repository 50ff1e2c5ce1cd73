"""Prompts and scores of lm-evaluation-harness."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from evaluation.small import CONFIG, make_samples, run_eval, save_model
from token_sparse_attention import bundled
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation import harness
from token_sparse_attention.evaluation.record import load_results
from token_sparse_attention.evaluation.samples import SampleSet

datasets = pytest.importorskip("datasets")
pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

LONGBENCH_ROW = {
    "context": "Passage 1: The capital of Freedonia is Glorioska. " * 9,
    "question": "What is the capital of Freedonia?",
    "answers": ["Glorioska", "the city of Glorioska"],
}
INFINITEBENCH_ROWS = {
    "passkey": {
        "id": 0,
        "context": "Noise. " * 50 + "The pass key is 71432. " + "Noise. " * 50,
        "input": "What is the pass key?",
        "answer": ["71432"],
        "options": [],
    },
    "longbook_choice_en": {
        "id": 1,
        "context": "Rufus met Ada. " * 40,
        "input": "Who met Ada?",
        "answer": ["Rufus"],
        "options": ["Otis", "Rufus", "Mia", "Lou"],
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(bundled.MODEL)


def prepare(tokenizer, tasks, lengths=(2048,), limit=2, **options):
    return harness.prepare(
        tasks, lengths, limit, tokenizer=tokenizer, tokenizer_name="bundled", **options
    )


@pytest.fixture(scope="module")
def ruler(tokenizer):
    pytest.importorskip("wonderwords")
    return prepare(tokenizer, ["ruler"], lengths=(3000, 2048))


def test_ruler_makes_as_many_samples_as_asked_for(ruler, tokenizer):
    places = [(s.task, s.length, s.index) for s in ruler.samples]
    assert sorted(places) == sorted(
        (task, length, index)
        for task in harness.LOCAL_RULER
        for length in (2048, 3000)
        for index in range(2)
    )
    assert [length for _, length, _ in places] == sorted(length for _, length, _ in places)
    assert list(ruler.tasks) == list(harness.LOCAL_RULER)
    for sample in ruler.samples:
        doc = sample.unpack_doc()
        assert sample.prompt.endswith(doc["gen_prefix"])
        assert doc["input"] in sample.prompt
        assert 0.4 < len(tokenizer(sample.prompt)["input_ids"]) / sample.length < 1.1
        assert sample.max_new_tokens in (30, 50, 120, 128)


def test_samples_depend_on_task_length_and_seed_alone(ruler, tokenizer):
    state = random.getstate(), repr(np.random.get_state())
    alone = prepare(tokenizer, ["ruler_cwe", "niah_multikey_3"], limit=3)
    assert (random.getstate(), repr(np.random.get_state())) == state
    among = {(s.task, s.length, s.index): s for s in ruler.samples}
    for sample in alone.samples:
        if sample.index < 2:
            assert sample == among[sample.task, sample.length, sample.index]
    other = prepare(tokenizer, ["niah_multikey_3"], seed=1)
    assert not {s.prompt for s in other.samples} & {s.prompt for s in alone.samples}
    assert other.seed == 1


def test_lengths_too_short_for_a_task_are_refused(tokenizer):
    pytest.importorskip("wonderwords")
    with pytest.raises(UsageError, match="ruler_cwe cannot be made as short as 1024 tokens"):
        prepare(tokenizer, ["ruler_cwe"], lengths=(1024,))
    with pytest.raises(UsageError, match="at least 1024 for ruler_vt"):
        prepare(tokenizer, ["ruler_vt"], lengths=(4096, 600))


def test_lm_eval_is_left_as_it_was(ruler):
    from lm_eval.tasks.ruler import common_utils, niah_utils, prepare_niah

    assert ruler.samples
    assert niah_utils.generate_samples is prepare_niah.generate_samples
    assert niah_utils.get_tokenizer is common_utils.get_tokenizer


def test_ruler_replies_score_the_share_of_the_answers(ruler):
    scorer = harness.Scorer(ruler)
    for sample in ruler.samples:
        answers = sample.unpack_doc()["outputs"]
        assert scorer.score(sample, f"they are {', '.join(answers)}.") == 1
        assert scorer.score(sample, "") == 0
        assert scorer.score(sample, answers[0]) == pytest.approx(1 / len(answers))


def test_chat_templates_are_applied(tokenizer):
    pytest.importorskip("wonderwords")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled.MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (sample,) = prepare(tokenizer, ["niah_single_1"], limit=1, chat_template=True).samples
    assert sample.prompt.startswith("[user]A special magic number")
    assert f"[assistant]{sample.unpack_doc()['gen_prefix']}" in sample.prompt


def local_rows(monkeypatch, rows):
    """Give lm-eval these rows for any data set; `rows` by split."""
    data = {split: datasets.Dataset.from_list([row] * 3) for split, row in rows.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: data)


def test_infinitebench_on_local_rows(tokenizer, monkeypatch, tmp_path):
    local_rows(monkeypatch, INFINITEBENCH_ROWS)
    names = [f"infinitebench_{split}" for split in INFINITEBENCH_ROWS]
    made = prepare(tokenizer, names)
    monkeypatch.delattr(datasets, "load_dataset")  # scoring must not load anything
    made.save(tmp_path / "s.jsonl.gz")
    made = SampleSet.load(tmp_path / "s.jsonl.gz")
    assert [(s.task, s.length, s.index) for s in made.samples] == [
        (name, 0, index) for index in range(2) for name in names
    ]
    passkey, choice = made.samples[:2]
    assert passkey.until == ["\n"]
    assert "The pass key is 71432" in passkey.prompt
    assert "B. Rufus" in choice.prompt
    scorer = harness.Scorer(made)
    assert scorer.score(passkey, " 71432.") == 1
    assert scorer.score(passkey, "71433") == 0
    assert scorer.score(choice, "B") == 1
    assert scorer.score(choice, "A") == 0


def test_longbench_on_local_rows(tokenizer, monkeypatch):
    for module in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(module)
    local_rows(monkeypatch, {"test": LONGBENCH_ROW})
    made = prepare(tokenizer, ["longbench_hotpotqa", "longbench_gov_report"], limit=1)
    question = made.samples[0]
    assert question.max_new_tokens == 32
    assert "Question: What is the capital of Freedonia?" in question.prompt
    scorer = harness.Scorer(made)
    assert scorer.score(question, "Glorioska") == 1
    assert scorer.score(question, "Glorioska, I think") == pytest.approx(0.5)
    assert scorer.score(made.samples[1], "Glorioska") == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("infinitebench_paskey", "no task .* did you mean infinitebench_passkey"),
        ("infinitebench_math_calc_long", "no task"),
    ],
)
def test_unknown_tasks_are_named_with_near_misses(tokenizer, monkeypatch, task, message):
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager  # reading every task takes long; the family is enough here
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda **options: whole(
            include_path=[lm_eval.tasks.__path__[0] + "/infinitebench"],
            include_defaults=False,
            metadata=options["metadata"],
        ),
    )
    with pytest.raises(UsageError, match=message):
        prepare(tokenizer, [task])


def test_tasks_that_ask_for_likelihoods_are_refused(tokenizer, monkeypatch):
    row = {"sentence": "Ada met _.", "option1": "Otis", "option2": "Mia", "answer": "1"}
    local_rows(monkeypatch, {"train": row, "validation": row})
    with pytest.raises(
        UsageError, match=r"winogrande must ask for text .* asks for multiple_choice"
    ):
        prepare(tokenizer, ["winogrande"])


def test_samples_of_another_version_are_not_scored():
    with pytest.raises(UsageError, match=r"scored by lm-eval 0\.0\.1"):
        harness.Scorer(make_samples(lm_eval="0.0.1"))


def test_prepare_generate_and_score_apart(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wonderwords")
    model, samples, out = (str(tmp_path / name) for name in ("model", "s.jsonl.gz", "r.jsonl"))
    save_model(model)
    asked = ("--tasks", "niah_single_1,ruler_fwe", "--lengths", "1024", "--limit", "2")
    assert run_eval(model, *asked, "--prepare-only", "--samples", samples) == 0
    generate = (model, "--samples", samples, "--config", f"a={CONFIG}", "--out")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(harness, "installed_version", lambda: None)
        assert run_eval(*generate, out) == 0
    assert "8 replies have no score yet" in capsys.readouterr().out
    assert {result.score for result in load_results(out).samples} == {None}
    assert run_eval("--score", out, "--samples", samples, "--json") == 0
    assert json.loads(capsys.readouterr().out)["unscored"] == 0
    together = str(tmp_path / "together.jsonl")
    assert run_eval(*generate, together) == 0
    assert [r.score for r in load_results(out).samples] == [
        r.score for r in load_results(together).samples
    ]
    direct = str(tmp_path / "direct.jsonl")
    assert run_eval(model, *asked, "--config", f"a={CONFIG}", "--out", direct) == 0
    assert load_results(direct).header == load_results(together).header
    make_samples().save(tmp_path / "s.jsonl.gz")
    with pytest.raises(UsageError, match="the file that the results were made from"):
        run_eval("--score", out, "--samples", samples)
