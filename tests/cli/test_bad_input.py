"""Inputs that a command cannot use: one line on standard error, and exit code 2 or 1."""

from __future__ import annotations

import gzip
import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Lfm2Config, LlamaConfig

from token_sparse_attention import bundled
from token_sparse_attention.benchmark import measuring
from token_sparse_attention.cli import BAD_INPUT, FAILED, TRACEBACK, main
from token_sparse_attention.cli.command import working
from token_sparse_attention.cli.info import Info
from token_sparse_attention.evaluation import harness
from token_sparse_attention.evaluation.samples import Sample, SampleSet
from token_sparse_attention.profile import PROFILE_FILE

TEXT = "Some words that are read. " * 30
LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "eos_token_id": None,
    "bos_token_id": None,
}
RAISING = "{{ raise_exception('first message must be\n system') }}"
UNFORESEEN = "unexpected "  # begins what `main` says of an error that no code foresaw


def make(folder, config, **generation):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled.MODEL).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints with one fault each, and a good one."""
    folder = tmp_path_factory.mktemp("models")
    make(folder / "good", LlamaConfig(**LLAMA))
    for name in (
        "truncated",
        "pointer",
        "missing",
        "surplus",
        "profile",
        "latin",
        "template",
        "sizes",
        "tokens",
    ):
        shutil.copytree(folder / "good", folder / name)
    weights = folder / "good" / "model.safetensors"
    (folder / "truncated" / weights.name).write_bytes(weights.read_bytes()[:1000])
    (folder / "pointer" / weights.name).write_text("version https://git-lfs.github.com/spec/v1\n")
    kept = {name: w for name, w in load_file(weights).items() if "1.self_attn.q_proj" not in name}
    save_file(kept, folder / "missing" / weights.name, metadata={"format": "pt"})
    more = {f"model.layers.{n}.self_attn.q_proj.bias": torch.ones(64) for n in range(2)}
    more = load_file(weights) | more
    save_file(more, folder / "surplus" / weights.name, metadata={"format": "pt"})
    (folder / "profile" / PROFILE_FILE).write_text('{"version": 2, "base": {"drop_mas": 0.1}}')
    (folder / "latin" / PROFILE_FILE).write_bytes(b'{"caf\xe9": 1}')
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    tokenizer.chat_template = RAISING
    tokenizer.save_pretrained(folder / "template")
    tokens = folder / "tokens" / "tokenizer_config.json"
    tokens.write_text(json.dumps(json.loads(tokens.read_text()) | {"model_max_length": "many"}))
    sizes = folder / "sizes" / "config.json"
    sizes.write_text(json.dumps(json.loads(sizes.read_text()) | {"hidden_size": "wide"}))
    make(folder / "vocabulary", LlamaConfig(**LLAMA | {"vocab_size": 50}))
    make(folder / "beams", LlamaConfig(**LLAMA), num_beams=3, num_return_sequences=2)
    gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 4096}
    make(folder / "gpt2", GPT2Config(**gpt2, bos_token_id=None, eos_token_id=None))
    kinds = ["conv", "full_attention"]
    make(folder / "lfm2", Lfm2Config(**LLAMA, layer_types=kinds))
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """What a user has, in the folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "latin").write_bytes("caf\xe9 ".encode("latin-1") * 30)
    (tmp_path / "half.jsonl").write_text('{"prompt": "half \\ud83d of an emoji"}\n')
    return tmp_path


def stdin_of(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def error_of(capsys, *words, code=BAD_INPUT):
    """Run a command that fails, and return the error; only progress may precede it."""
    capsys.readouterr()
    try:
        ended = main([str(word) for word in words])
    except SystemExit as stopped:
        ended = stopped.code
    *progress, error = capsys.readouterr().err.splitlines()
    assert ended == code, error
    assert all(line.startswith("tsa: ") for line in progress), progress
    assert UNFORESEEN not in error
    return error


def run_words(model, *more, prompt="text"):
    return ("run", model, "--prompt-file", prompt, "--max-new-tokens", 2, *more)


def words_of(name, model):
    """Words that run a command on a model."""
    given = {
        "run": ("run", model, "--prompt-file", "text", "--max-new-tokens", 2),
        "capture": ("capture", model, "--prompt-file", "text", "--out", "kept.json"),
        "calibrate": ("calibrate", model, "--method", "drift", "--text", "text", "--length", 90),
    }
    return given[name]


@pytest.mark.parametrize("command", ["run", "capture", "calibrate"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("truncated", "truncated cannot be loaded: "),
        ("pointer", "pointer cannot be loaded: "),
        ("sizes", "sizes cannot be loaded: "),
        ("tokens", "the tokenizer failed: "),
        ("missing", "no weights for model.layers.1.self_attn.q_proj.weight, and lacks 1 in all"),
        ("vocabulary", "the tokenizer must be the model's, of 50 tokens; got token "),
        ("gpt2", "must fit the 64 positions that this model has embeddings for, got "),
    ],
)
def test_checkpoints_that_cannot_be_used(models, folder, capsys, command, model, message):
    assert message in error_of(capsys, *words_of(command, models / model))
    assert not (folder / "kept.json").exists()


def test_weights_that_the_model_has_no_place_for_are_told(models, capsys):
    for model, count in (("good", 0), ("surplus", 1)):
        assert main([*map(str, run_words(models / model, "--json"))]) == 0
        warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert len(warnings) == count
    assert warnings[0].startswith(
        "tsa: warning: the model has no place for 2 of the checkpoint's weights, such as "
        "model.layers.0.self_attn.q_proj.bias; "
    )


@pytest.mark.parametrize("option", ["--out", "--plot"])
@pytest.mark.parametrize(
    "words",
    [
        "capture MODEL --prompt-file text --out text",
        "calibrate MODEL --method drift --text text OPTION text",
        "calibrate MODEL --method drift --prompts text OPTION text",
        "calibrate MODEL --method drift --measured text OPTION text",
        "calibrate MODEL --method drift --out both.svg --plot both.svg",
        "calibrate MODEL --method drift --measured a.measured.json --out a.json",
        "eval MODEL --samples text --out text",
        "eval MODEL --samples samples --dense-from text --out ./text",
        "fidelity MODEL --text text OPTION text",
        "report text --out text",
    ],
)
def test_inputs_are_not_replaced(models, folder, capsys, option, words):
    words = words.replace("OPTION", option).replace("MODEL", str(models / "good")).split()
    assert " must be another file: this one is " in error_of(capsys, *words)
    assert (folder / "text").read_text() == TEXT


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("template", "the tokenizer's chat template failed: first message must be system"),
        ("profile", f"profile/{PROFILE_FILE} cannot be used: config has an unknown entry"),
        ("latin", f"latin/{PROFILE_FILE} cannot be used: "),
    ],
)
def test_files_beside_a_model_that_cannot_be_used(models, capsys, model, message):
    for command in ("run", "capture"):
        assert message in error_of(capsys, *words_of(command, models / model))


def test_a_profile_that_cannot_be_used_can_be_left_out(models):
    assert main([*map(str, run_words(models / "profile", "--config", "default"))]) == 0


def test_the_checkpoints_own_search_is_left_out(models, capsys):
    answers = []
    for model in ("good", "beams"):
        assert main([*map(str, run_words(models / model, "--json"))]) == 0
        answers.append(json.loads(capsys.readouterr().out)["sparse"]["text"])
    assert answers[0] == answers[1]


def test_a_prompt_and_a_reply_that_fill_all_learned_positions(models, folder, capsys):
    (folder / "short").write_text("word " * 8)
    words = run_words(models / "gpt2", "--json", prompt="short")
    assert main([*map(str, words)]) == 0
    read = json.loads(capsys.readouterr().out)["sparse"]["prompt_tokens"]
    limits = {64 - read: 0, 64 - read + 1: BAD_INPUT}
    for new, code in limits.items():
        assert main([*map(str, words), "--max-new-tokens", str(new)]) == code


def test_bytes_that_are_not_utf_8(models, folder, capsys, monkeypatch):
    good = models / "good"
    stdin_of(monkeypatch, (folder / "latin").read_bytes())
    error = error_of(capsys, *run_words(good, prompt="-"))
    assert error.startswith("tsa: --prompt-file - cannot be read: it is not UTF-8: ")
    error = error_of(capsys, *run_words(good, "--question", "caf\udce9?"))
    assert "--question: the text must be Unicode text, but holds half a character" in error
    words = ("calibrate", good, "--method", "drift", "--prompts", "half.jsonl")
    error = error_of(capsys, *words)
    assert "half.jsonl, line 1: prompt must be Unicode text, but holds half a character" in error


def test_closed_standard_input(models, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    error = error_of(capsys, *run_words(models / "good", prompt="-"))
    assert error == "tsa: --prompt-file - cannot be read: standard input is closed"


def test_the_mark_that_begins_a_text_is_no_part_of_it(models, folder, capsys, monkeypatch):
    (folder / "marked").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    lengths = []
    for prompt in ("text", "marked", "-"):
        stdin_of(monkeypatch, (folder / "marked").read_bytes())
        assert main([*map(str, run_words(models / "good", "--json", prompt=prompt))]) == 0
        lengths.append(json.loads(capsys.readouterr().out)["sparse"]["prompt_tokens"])
    assert lengths[0] == lengths[1] == lengths[2]


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "complex64", "bool", "Tensor"])
def test_dtypes_that_no_model_computes_in(capsys, dtype):
    error = error_of(capsys, *run_words("model", "--dtype", dtype))
    assert f"such as bfloat16, got '{dtype}'" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bench op --budget-seconds inf", "--budget-seconds: must be a number, got 'inf'"),
        ("bench op --budget-seconds -1", "--budget-seconds: must be at least 0, got -1.0"),
        ("eval --lengths 99999999999999", "--lengths: must be at most 16777216, got 9999"),
        ("bench op --lengths 99999999999999", "--lengths: must be at most 16777216, got 9999"),
        ("bench op --kept 0.5,nan", "--kept: must be numbers like 0.1,0.5, got '0.5,nan'"),
        (
            "calibrate --method sensitivity --divergence-budget nan",
            "--divergence-budget: must be a number, got 'nan'",
        ),
    ],
)
def test_numbers_that_are_no_quantity(capsys, words, message):
    assert message in error_of(capsys, *words.split())


def test_folders_and_names_that_no_model_has(tmp_path, capsys):
    error = error_of(capsys, *run_words(str(tmp_path)))
    assert f"{tmp_path} cannot be loaded: the folder has no config.json" in error
    assert "model must be a hub id or a folder" in error_of(capsys, *run_words(" "))


@pytest.mark.parametrize("command", ["run", "capture", "calibrate"])
def test_files_in_place_of_a_models_folder(folder, capsys, command):
    (folder / "x.gguf").write_bytes(b"GGUF")
    error = error_of(capsys, *words_of(command, "x.gguf"))
    assert error == (
        "tsa: x.gguf cannot be loaded: GGUF files are not read; give the hub id or the folder of "
        "the model's safetensors"
    )
    assert "text cannot be loaded: it is a file; " in error_of(capsys, *words_of(command, "text"))


def never(*_, **__):
    raise AssertionError("the job began")


@pytest.mark.parametrize("out", [".", "text/below.json", "n" * 300])
@pytest.mark.parametrize(
    "words",
    [
        "capture MODEL --prompt-file text --out OUT",
        "calibrate MODEL --method drift --out OUT",
        "calibrate MODEL --method drift --plot OUT",
        "eval MODEL --out OUT",
        "fidelity MODEL --text text --out OUT",
        "eval MODEL --prepare-only --samples OUT",
        "bench op --device cpu --out OUT",
        "bench prefill --device cpu --out OUT",
        "report text --out OUT",
    ],
)
def test_outputs_that_cannot_be_written_are_told_first(capsys, monkeypatch, words, out):
    monkeypatch.setattr("token_sparse_attention.run.load_model", never)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", never)
    monkeypatch.setattr(measuring, "collect", never)
    words = words.replace("OUT", out).replace("MODEL", "model").split()
    option = "--samples" if "--samples" in words else words[-2]
    assert error_of(capsys, *words).startswith(f"tsa: {option} {out} cannot be written: ")


def test_results_that_cannot_be_gone_on_with_are_told_first(folder, capsys, monkeypatch):
    monkeypatch.setattr("token_sparse_attention.run.load_model", never)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", never)
    error = error_of(capsys, "eval", "--out", "text")
    assert error == "tsa: text must begin with the header of an evaluation, but does not"
    assert (folder / "text").read_text() == TEXT
    (folder / "text").write_text(f"{TEXT}\n")
    assert "text, line 1 is not valid JSON" in error_of(capsys, "eval", "--out", "text")
    assert "must not end in .gz" in error_of(capsys, "eval", "--out", "result.gz")


def prepare(path, prompt=TEXT):
    sample = Sample("task", 0, 0, prompt, [], 6, {})
    SampleSet("0", "bundled", False, 0, [], 1, {"task": 1}, [sample]).save(path)


def test_evaluation_of_a_model_with_layers_that_keep_a_state(models, folder, monkeypatch):
    monkeypatch.setattr(harness, "installed_version", lambda: None)
    prepare(folder / "samples.jsonl.gz")
    words = ("eval", models / "lfm2", "--samples", "samples.jsonl.gz", "--out", "result.jsonl")
    settings = '{"block_size": 16, "num_probes": 8, "sink_size": 0, "num_samples": 8}'
    assert main([*map(str, words), "--config", f"[/b]={settings}"]) == 0
    _, *results = map(json.loads, (folder / "result.jsonl").read_text().splitlines())
    assert len(results) == 2
    assert results[0]["reply"] == results[1]["reply"]
    model = AutoModelForCausalLM.from_pretrained(models / "lfm2").eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "lfm2")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    reply = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert results[0]["reply"] == tokenizer.decode(reply, skip_special_tokens=True)
    assert results[0]["new_tokens"] == len(reply)


def test_samples_that_no_model_can_read(models, folder, capsys, monkeypatch):
    monkeypatch.setattr(harness, "installed_version", lambda: None)
    words = ("eval", models / "vocabulary", "--samples", "s.jsonl.gz", "--out", "result.jsonl")
    prepare(folder / "s.jsonl.gz")
    assert "the tokenizer must be the model's, of 50 tokens" in error_of(capsys, *words)
    lines = gzip.decompress((folder / "s.jsonl.gz").read_bytes()).splitlines()
    lines[1] = lines[1].replace(b"Some words", b"\\ud83d")
    (folder / "s.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    error = error_of(capsys, *words)
    assert "s.jsonl.gz, line 2: prompt must be Unicode text" in error


def test_a_failure_on_the_way_is_a_failed_job(models, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the device\n went away")

    monkeypatch.setattr("token_sparse_attention.run._generate", fail)
    for command in ("run", "capture"):
        error = error_of(capsys, *words_of(command, models / "good"), code=FAILED)
        assert error.endswith("good could not be run sparse: the device went away")


def test_what_no_code_foresaw_is_one_line(capsys, monkeypatch):
    def fail(_):
        raise ZeroDivisionError("several\nlines")

    monkeypatch.setattr(Info, "run", fail)
    assert main(["info"]) == FAILED
    assert capsys.readouterr().err == (
        f"tsa: unexpected ZeroDivisionError: several lines (with {TRACEBACK}=1 a traceback)\n"
    )
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ZeroDivisionError):
        main(["info"])


@pytest.mark.parametrize(
    ("redirected", "code", "message"),
    [
        (">&-", BAD_INPUT, "tsa: standard output is closed\n"),
        (
            "> /dev/full",
            FAILED,
            "tsa: standard output cannot be written: No space left on device\n",
        ),
    ],
)
def test_standard_output_that_cannot_be_written(redirected, code, message):
    script = (
        "import sys; from token_sparse_attention.cli import info, script\n"
        "info.Info.run = lambda self: print('facts') or True; sys.argv[1:] = ['info']; script()"
    )
    command = f"{shlex.join([sys.executable, '-c', script])} {redirected}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, message)


def test_errors_in_an_encoding_without_some_characters():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "token_sparse_attention.cli", "run", "--prompt-file", "é"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == BAD_INPUT
    assert done.stderr == ("tsa: --prompt-file \\xe9 cannot be read: No such file or directory\n")


def test_names_that_look_like_markup(monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    with working("loading [/b]") as status:
        status.update("reading [/i]")
    assert "reading [/i]" in shown.getvalue()
