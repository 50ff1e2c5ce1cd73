"""tsa calibrate: prompts, files, output, exit codes, and what it says about bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.commands import run
from integrations.models import (
    CONFIG,
    LAYERS,
    SAMPLING,
    WORDS,
    make_ids,
    make_model,
    make_tokenizer,
)
from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig
from token_sparse_attention.calibration.prompts import file_prompts, text_prompts
from token_sparse_attention.calibration.record import CalibrationResult
from token_sparse_attention.calibration.show import draw, layer_table, ranges, sentences
from token_sparse_attention.errors import UsageError
from token_sparse_attention.integrations.transformers import apply


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, texts, prompts and a config, as a user would have them."""
    folder = tmp_path_factory.mktemp("user")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "a.txt").write_text(" ".join(WORDS[(7 * i) % 190] for i in range(300)))
    (folder / "config.json").write_text(CONFIG.to_json())
    (folder / "keys.json").write_text(SAMPLING.to_json())
    entries = [
        {"prompt": " ".join(WORDS[:120]), "continuation": "word3 word4 word5"},
        {"prompt": " ".join(WORDS[60:])},
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    return folder


def calibrate(*arguments):
    """Run the command, and return its exit code."""
    return run("calibrate", *arguments)


def test_drift_writes_a_profile_and_what_was_measured(folder, tmp_path, capsys):
    out = tmp_path / "new" / "profile.json"
    assert calibrate(
        folder / "model", "--method", "drift", "--text", folder / "a.txt", "--length", 90,
        "--num-prompts", 2, "--out", out, "--plot", tmp_path / "plot.png",
    ) == 0  # fmt: skip
    profile = LayerProfile.from_json(out.read_text())
    result = CalibrationResult.load(tmp_path / "new" / "profile.measured.json")
    assert profile == result.profile
    assert profile.base == TokenSelectionConfig()
    assert sorted(profile.layers) == [row.layer for row in result.drift if row.at_or_below]
    assert [prompt.tokens for prompt in result.prompts] == [90, 90]
    assert result.sensitivity == ()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "By drift: 2 of 3 layers sparse" in printed.replace("\n", " ")
    assert str(out) in printed.replace("\n", "")


def test_both_prints_json_with_prompts_of_their_own(folder, tmp_path, capsys):
    assert calibrate(
        folder / "model", "--method", "both", "--prompts", folder / "p.jsonl", "--config",
        folder / "config.json", "--values", "0.1,0.3", "--divergence-budget", 100,
        "--reply-tokens", 5, "--out", tmp_path / "profile.json", "--json",
    ) == 0  # fmt: skip
    result = CalibrationResult.from_json(capsys.readouterr().out)
    assert [(p.tokens, p.continuation_tokens) for p in result.prompts] == [(120, 3), (130, 5)]
    assert [choice.goal for choice in result.choices] == ["drift_quantile", "divergence_budget"]
    assert sorted(result.profile.layers) == [0, 1, 2]
    assert result.base == CONFIG
    assert result.arguments["values"] == [0.1, 0.3]
    assert result == CalibrationResult.load(tmp_path / "profile.measured.json")

    table = layer_table(result)
    assert table.row_count == LAYERS
    assert len(table.columns) == 6
    told = " ".join(sentences(result))
    assert "Measured on 2 prompts of 120 to 130 tokens." in told
    assert "over 10 positions" in told
    assert "divergence budget 100: 3 of 3 layers sparse (0-2)" in told
    for choice in result.choices:
        first, second = choice.prompt_divergences
        assert choice.divergence == (first + second) / 2
        number, most = (1, first) if first > second else (2, second)
        assert f"nats (most on prompt {number} of 2: {most:.3g}), attention work" in told
    svg = draw(result, ".svg")
    assert svg.count(b'id="axes_') == 2
    assert svg == draw(result, ".svg")


def test_numbers_of_samples_are_tried_and_the_profile_runs_with_them(folder, tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert calibrate(
        folder / "model", "--method", "sensitivity", "--text", folder / "a.txt", "--length", 120,
        "--num-prompts", 1, "--config", folder / "keys.json", "--values", "6,20,500",
        "--target-speedup", 2, "--reply-tokens", 2, "--out", out, "--json",
        "--plot", tmp_path / "plot.svg",
    ) == 0  # fmt: skip
    result = CalibrationResult.from_json(capsys.readouterr().out)
    assert [row.setting.value for row in result.sensitivity] == [6, 20, 500] * LAYERS
    assert [row.work == 1 for row in result.sensitivity] == [False, False, True] * LAYERS
    assert result.arguments["values"] == [6, 20, 500]
    drawn = (tmp_path / "plot.svg").read_text()
    assert all(f">num_samples {count}<" in drawn for count in (6, 20, 500))
    told = " ".join(sentences(result))
    assert result.choices[0].prompt_divergences == (result.choices[0].divergence,)
    assert "most on prompt" not in told
    assert "layers 0-2 at num_samples 500 (every query attends to every key)" in told
    profile = LayerProfile.from_json(out.read_text())
    assert profile.layers
    model = make_model()
    with apply(model, profile) as report:
        model(make_ids(150))
    for record in report:
        if record.layer in profile.layers:
            wanted = profile.layers[record.layer]["num_samples"] + SAMPLING.sink_size
            assert record.paths == ["sparse"]
            assert all(abs(count - wanted) <= 1 for count in record.kept[0])
    assert result.choices[0].work <= 0.5


def test_heads_are_measured_where_asked_for(folder, tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert calibrate(
        folder / "model", "--method", "sensitivity", "--text", folder / "a.txt", "--length", 120,
        "--num-prompts", 1, "--config", folder / "keys.json", "--values", "6", "--heads-of", 1,
        "--target-speedup", 1.5, "--reply-tokens", 2, "--out", out, "--json",
    ) == 0  # fmt: skip
    result = CalibrationResult.from_json(capsys.readouterr().out)
    assert len(result.heads) == 4
    assert [len(row.setting.dense_heads) for row in result.sensitivity] == [0] * LAYERS + [1, 2]
    assert result.arguments["heads_of"] == 1
    assert LayerProfile.from_json(out.read_text()) == result.profile
    measured = tmp_path / "profile.measured.json"
    with pytest.raises(UsageError, match="heads-of does not go with it"):
        calibrate(
            "--method", "sensitivity", "--measured", measured, "--heads-of", 1,
            "--target-speedup", 2,
        )  # fmt: skip


def test_a_goal_out_of_reach_fails_and_keeps_the_measurements(folder, tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert calibrate(
        folder / "model", "--method", "sensitivity", "--text", folder / "a.txt", "--length", 90,
        "--num-prompts", 1, "--config", folder / "config.json", "--values", "0.1",
        "--target-speedup", 50, "--out", out, "--reply-tokens", 0,
    ) == 1  # fmt: skip
    assert not out.exists()
    result = CalibrationResult.load(tmp_path / "profile.measured.json")
    assert len(result.sensitivity) == LAYERS
    assert "No profile: target speed-up 50 is out of reach" in capsys.readouterr().out


def test_a_profile_gives_its_base_and_a_model_folder_its_own(folder, tmp_path, capsys):
    base = TokenSelectionConfig(min_tokens=16, observation_window=16, fallback="window")
    profile = tmp_path / "given.json"
    profile.write_text(LayerProfile(base, {1: {}}).to_json())
    cut = ("--text", folder / "a.txt", "--length", 90, "--num-prompts", 1, "--json")
    calibrate(folder / "model", "--method", "drift", "--config", profile, *cut)
    assert CalibrationResult.from_json(capsys.readouterr().out).base == base
    goal = ("--method", "sensitivity", "--divergence-budget", 1)
    assert calibrate(folder / "model", *goal, *cut) == 1, "too short for the defaults"
    assert CalibrationResult.from_json(capsys.readouterr().out).base == KVSamplingConfig()
    own = folder / "model" / "token_sparse_profile.json"
    own.write_text(profile.read_text())
    calibrate(folder / "model", *goal, *cut)
    own.unlink()
    assert CalibrationResult.from_json(capsys.readouterr().out).base == base


def test_values_are_of_the_method_that_the_settings_are_of(folder, capsys):
    own = folder / "model" / "token_sparse_profile.json"
    own.write_text(LayerProfile(TokenSelectionConfig(), {1: {}}).to_json())
    cut = ("--text", folder / "a.txt", "--length", 90, "--num-prompts", 1, "--json")
    goal = ("--method", "sensitivity", "--divergence-budget", 1, "--values", 8)
    with pytest.raises(UsageError, match=r"drop_mass must be in \[0, 1\), got 8"):
        calibrate(folder / "model", *goal, *cut)
    calibrate(folder / "model", *goal, "--config", "default", *cut)
    own.unlink()
    assert CalibrationResult.from_json(capsys.readouterr().out).base == KVSamplingConfig()


def test_short_texts_and_samples_that_cover_a_prompt_are_warned_of(folder, capsys):
    short = folder / "short.txt"
    short.write_text("word1 word2 word3")
    settings = '{"block_size": 16, "num_probes": 8, "sliding_window": 40, "crossover": "off"}'
    calibrate(
        folder / "model", "--method", "sensitivity", "--divergence-budget", 1,
        "--values", "10,50", "--text", short, "--length", 90, "--num-prompts", 1,
        "--config", settings, "--json",
    )  # fmt: skip
    warned = capsys.readouterr().err
    assert "short.txt has 3 tokens, which are repeated to fill 90" in warned
    assert "50 samples and the window of 40 cover a prompt of 90 tokens" in warned
    assert "10 samples and" not in warned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method drift --prompts p.jsonl --length 9", "used whole"),
        ("--method sensitivity", "needs one goal"),
        (
            "--method sensitivity --divergence-budget 1 --config config.json --values 8",
            r"drop_mass must be in \[0, 1\), got 8",
        ),
        (
            "--method sensitivity --divergence-budget 1 --config keys.json --values 0.1",
            "num_samples must be an int, got 0.1",
        ),
        ("--method drift --drift-quantile 3", "drift_quantile must be in"),
        ("--method drift --text gone.txt", "--text gone.txt cannot be read"),
        ("--method drift --prompts gone.jsonl", "--prompts gone.jsonl cannot be read"),
        ("--method drift --config p.jsonl", "--config p.jsonl cannot be used"),
        ("--method drift --plot plot.pdf", "--plot must end in .svg or .png"),
        ("--method drift --out .", r"--out \. cannot be written"),
        ("--method drift --device moon", "cannot be loaded"),
    ],
)
def test_bad_input_is_named(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=message):
        calibrate("model", *arguments.split())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--values", "few"), "argument --values: must be numbers .*, got 'few'"),
    ],
)
def test_lists_hold_numbers(capsys, option, message):
    with pytest.raises(SystemExit):
        calibrate("--method", "sensitivity", *option)
    assert re.search(message, capsys.readouterr().err)


def test_texts_are_cut_in_turn_at_equal_distances():
    tokenizer = make_tokenizer()
    texts = [" ".join(WORDS[:100]), " ".join(WORDS[150:160])]
    cut = [p.ids[0].tolist() for p in text_prompts(tokenizer, texts, 40, 4)]
    assert cut[0] == list(range(4, 44))
    assert cut[2] == list(range(54, 94))
    short = list(range(154, 164))
    assert cut[1] == short * 4, "a short text is repeated"
    assert cut[3] == (short[5:] + short[:5]) * 4
    with_begin = text_prompts(make_tokenizer(begin=True), texts, 40, 3)
    assert [p.ids[0, :2].tolist() for p in with_begin] == [[1, 4], [1, 154], [1, 54]]
    assert {p.ids.shape for p in with_begin} == {(1, 40)}
    with pytest.raises(UsageError, match="text 1 must hold at least one token"):
        text_prompts(tokenizer, [" "], 40, 1)


def test_prompts_go_through_the_chat_template(folder):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "word9 {{ messages[0]['content'] }} word8"
    prompts = file_prompts(tokenizer, folder / "p.jsonl", 1)
    assert len(prompts) == 1
    assert prompts[0].ids[0].tolist() == [13, *range(4, 124), 12]
    assert prompts[0].continuation.tolist() == [[7, 8, 9]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\nnonsense', "line 2 is not valid JSON"),
        ('{"promt": "a"}', "line 1 has an unknown entry 'promt'; did you mean 'prompt'"),
        (
            '{"prompt": "a", "answer": "b"}',
            "line 1 has an unknown entry 'answer'; expected prompt",
        ),
        ('{"prompt": ""}', "line 1: prompt must be text, got ''"),
        ('{"prompt": "a", "continuation": 3}', "line 1: continuation must be str or null, got 3"),
        ("\n", "must hold at least one prompt"),
    ],
)
def test_prompt_files_are_read_strictly(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        file_prompts(make_tokenizer(), path, None)


def test_the_documented_prompts_can_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    code = page.split("## Prompts with questions")[1].split("```python")[1].split("```")[0]
    exec(code, {})
    prompts = file_prompts(make_tokenizer(), tmp_path / "prompts.jsonl", None)
    assert len(prompts) == 6
    assert min(prompt.ids.shape[1] for prompt in prompts) > 4000


def test_ranges():
    assert ranges([]) == ""
    assert ranges([0, 1, 3, 5, 6, 7]) == "0-1, 3, 5-7"


def test_another_goal_is_chosen_from_what_was_measured(folder, tmp_path, capsys):
    cut = ("--text", folder / "a.txt", "--length", 150, "--num-prompts", 2)
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    asked = ("--method", "sensitivity", "--config", folder / "keys.json", "--values", "8,48")
    calibrate(folder / "model", *asked, "--divergence-budget", 1e9, *cut, "--out", first)
    measured = tmp_path / "first.measured.json"
    before = CalibrationResult.load(measured)
    capsys.readouterr()

    def choose(*goal):
        return calibrate("--method", "sensitivity", "--measured", measured, *goal, "--out", again)

    # All that was measured: the same as was chosen by measuring it together.
    assert choose("--divergence-budget", 1e9) == 0
    assert LayerProfile.from_json(again.read_text()) == before.profile
    result = CalibrationResult.load(tmp_path / "again.measured.json")
    assert result.sensitivity == before.sensitivity
    assert (result.choices[-1].divergence, result.choices[-1].work) == (None, None)
    work = sum(
        min(row.work for row in before.sensitivity if row.layer == layer)
        for layer in range(LAYERS)
    )
    text = " ".join(capsys.readouterr().out.split())
    assert f"their own work is {work / LAYERS:.3f} of dense; not measured together" in text
    # For nothing only what costs nothing, a little for a little.
    assert choose("--divergence-budget", 0) == 0
    harmless = {row.layer for row in before.sensitivity if row.divergence == 0}
    assert harmless != set(range(LAYERS))
    assert set(LayerProfile.from_json(again.read_text()).layers) == harmless
    assert choose("--target-speedup", 1.1) == 0
    assert 0 < len(LayerProfile.from_json(again.read_text()).layers) < LAYERS
    result = CalibrationResult.load(tmp_path / "again.measured.json")
    assert (result.arguments["target_speedup"], result.arguments["divergence_budget"]) == (
        1.1,
        None,
    )
    assert choose("--target-speedup", 99) == 1
    assert "No profile: target speed-up 99 is out of reach" in capsys.readouterr().out


def test_bad_uses_of_earlier_measurements(folder, tmp_path):
    cut = ("--text", folder / "a.txt", "--length", 150, "--num-prompts", 1)
    out = tmp_path / "drift.json"
    calibrate(folder / "model", "--method", "drift", *cut, "--out", out)
    measured = ("--measured", tmp_path / "drift.measured.json", "--target-speedup", 2)
    for arguments, message in (
        (("--method", "sensitivity", *measured), "must have been measured, got method 'drift'"),
        (("--method", "drift", *measured), "need method sensitivity"),
        (("--method", "sensitivity", *measured, *cut), "text does not go with it"),
        ((folder / "model", "--method", "sensitivity", *measured), "model does not go with it"),
        (("--method", "sensitivity", *measured, "--out", out), "must be another file"),
        (("--method", "sensitivity", *measured[:2]), "needs one goal"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(*arguments)


def test_the_bundled_model_goes_by_its_name_wherever_it_lies(monkeypatch):
    from token_sparse_attention.calibration import job

    named = []

    def stop(*_, name, **__):
        named.append(name)
        raise ValueError("enough")

    monkeypatch.setattr(job, "calibrate", stop)
    with pytest.raises(UsageError, match="enough"):
        calibrate("--method", "drift", "--length", "64", "--num-prompts", "1")
    assert named == ["bundled"]
