"""The tsa command: output, exit codes, and what it says about bad input."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers

from integrations.models import WORDS, make_model, make_tokenizer
from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig, demo, run
from token_sparse_attention.attention.patterns import PATTERNS
from token_sparse_attention.calibration import job
from token_sparse_attention.cli import main
from token_sparse_attention.cli.commands import build_parser
from token_sparse_attention.errors import within_memory
from token_sparse_attention.profile import PROFILE_FILE
from token_sparse_attention.run import (
    FirstTokenClock,
    answer,
    encode_prompt,
    load_model,
)

DOCUMENT = " ".join(WORDS[(7 * i) % 190] for i in range(300))
CONFIG = TokenSelectionConfig(drop_mass=0.3, observation_window=16, min_tokens=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, a document and a config, as a user would have them."""
    folder = tmp_path_factory.mktemp("user")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "document.txt").write_text(DOCUMENT)
    (folder / "config.json").write_text(CONFIG.to_json())
    return folder


def run_json(capsys, *arguments):
    assert main(["run", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_run_answers_and_reports(folder, capsys):
    result = run_json(
        capsys,
        *(folder / "model", "--prompt-file", folder / "document.txt"),
        *("--question", "word1 word2", "--config", folder / "config.json"),
        *("--compare", "--max-new-tokens", "5"),
    )
    sparse, dense = result["sparse"], result["dense"]
    assert sparse["prompt_tokens"] == dense["prompt_tokens"] == 302
    assert [layer["paths"] for layer in sparse["layers"]] == [["sparse"]] * 3
    assert all(0 < max(layer["kept"][0]) < 302 for layer in sparse["layers"])
    assert "layers" not in dense
    for path in (sparse, dense):
        assert path["new_tokens"] == 5
        assert 0 < path["time_to_first_token_s"] < path["total_time_s"]
    assert result["config"] == CONFIG.to_dict()
    assert result["versions"]["torch"] == torch.__version__

    model, tokenizer = load_model(str(folder / "model"))
    ids = encode_prompt(tokenizer, DOCUMENT, "word1 word2")
    assert answer(model, tokenizer, ids, CONFIG, max_new_tokens=5).text == sparse["text"]
    assert answer(model, tokenizer, ids, None, max_new_tokens=5).text == dense["text"]


def test_run_prints_tables_for_people(folder, capsys):
    arguments = ["run", str(folder / "model"), "--prompt-file", str(folder / "document.txt")]
    arguments += ["--config", str(folder / "config.json"), "--compare", "--max-new-tokens", "3"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tokens kept per head" in printed
    assert "sparse: first token after" in printed
    assert "dense over sparse" in printed


def test_run_without_compare_claims_no_ratio(folder, capsys):
    arguments = ["run", str(folder / "model"), "--prompt-file", str(folder / "document.txt")]
    assert main([*arguments, "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr().out
    assert "dense over sparse" not in printed
    assert "context too short for" in printed


def test_run_reads_standard_input(folder, capsys, monkeypatch, tmp_path):
    prompt = tmp_path / "prompt"
    prompt.write_text(DOCUMENT)
    with prompt.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        result = run_json(capsys, folder / "model", "--prompt-file", "-", "--max-new-tokens", 2)
    assert result["sparse"]["prompt_tokens"] == 300
    assert result["config_source"] == "the library's defaults"


def test_a_model_folders_own_profile_is_the_default(folder, capsys, tmp_path):
    profile = LayerProfile(base=CONFIG, layers={1: {}})
    model = tmp_path / "model"
    model.mkdir()
    for file in (folder / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / PROFILE_FILE).write_text(profile.to_json())
    arguments = (model, "--prompt-file", folder / "document.txt", "--max-new-tokens", 2)
    result = run_json(capsys, *arguments)
    assert [layer["paths"][0] for layer in result["sparse"]["layers"]] == [
        "dense",
        "sparse",
        "dense",
    ]
    assert result["config_source"] == f"{PROFILE_FILE} of the model"
    result = run_json(capsys, *arguments, "--config", folder / "config.json")
    assert result["config"] == CONFIG.to_dict()


def test_the_clock_stops_at_the_first_new_token():
    clock = FirstTokenClock()
    clock.put(torch.zeros(1, 300))
    assert clock.first_token is None, "the prompt comes first"
    clock.put(torch.zeros(1))
    first = clock.first_token
    assert first > 0
    clock.put(torch.zeros(1))
    assert clock.first_token == first


def test_prompts_go_through_the_chat_template_if_there_is_one():
    tokenizer = make_tokenizer()
    plain = encode_prompt(tokenizer, "word1 word2\n", "word3")
    assert (
        plain.tolist()
        == tokenizer("word1 word2\n\nword3\n", return_tensors="pt")["input_ids"].tolist()
    )
    tokenizer.chat_template = "word9 {{ messages[0]['content'] }} word8"
    chat = encode_prompt(tokenizer, "word1 word2\n", "word3")
    assert tokenizer.decode(chat[0]) == "word9 word1 word2 word3 word8"


def test_a_prompt_beyond_the_models_positions_is_warned_about(folder, capsys, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text(" ".join(WORDS * 11))
    assert main(["run", str(folder / "model"), "--prompt-file", str(long), "--json"]) == 0
    assert "exceed the 2048 positions" in capsys.readouterr().err


def leaves(parser):
    """All commands that do something, and those above them."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from leaves(command)


def test_every_help_has_an_example_and_says_what_arguments_and_exit_codes_mean():
    parsers = list(leaves(build_parser()))
    assert len(parsers) > 8
    for parser in parsers:
        text = parser.format_help()
        assert "example:\n  tsa " in text, parser.prog
        assert "exit codes: 0 success, 1 the job failed, 2 bad" in text, parser.prog
        unexplained = [
            action.option_strings or action.dest for action in parser._actions if not action.help
        ]
        assert unexplained == [], parser.prog


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run --prompt-file a --dtype bf", "--dtype: must be auto or a torch dtype .* got 'bf'"),
        ("bench op --lengths 8,b", "--lengths: must be whole numbers like 4096,8192, got '8,b'"),
        ("bench op --kept 0.5,half", "--kept: must be numbers like 0.1,0.5, got '0.5,half'"),
        ("eval --lengths abc", "--lengths: must be whole numbers like 4096,8192, got 'abc'"),
        (
            "calibrate --method drift --reply-tokens x",
            "--reply-tokens: must be a whole number, got 'x'",
        ),
        ("bench op --heads few", "--heads: must be a whole number, got 'few'"),
    ],
)
def test_arguments_that_are_none_are_named(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("value", ["published", "default", '{"num_samples": 20}', "FILE"])
def test_run_takes_the_settings_that_evaluation_takes(folder, capsys, value):
    value = str(folder / "config.json") if value == "FILE" else value
    result = run_json(
        capsys,
        *(folder / "model", "--prompt-file", folder / "document.txt", "--config", value),
    )
    assert result["config_source"] == value
    expected = {"published": TokenSelectionConfig(), "default": KVSamplingConfig()}
    expected['{"num_samples": 20}'] = KVSamplingConfig(num_samples=20)
    assert result["config"] == expected.get(value, CONFIG).to_dict()


def test_a_run_that_was_dense_everywhere_says_so(folder, capsys):
    asked = ("run", str(folder / "model"), "--prompt-file", str(folder / "document.txt"))
    assert main([*asked, "--config", "default"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "'sparse' ran dense in every layer (context too short for the method" in printed
    assert "compares dense with dense" not in printed
    assert main([*asked, "--config", "default", "--compare"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "any key out): this compares dense with dense" in printed
    note = run_json(capsys, *asked[1:], "--config", "default", "--compare")["note"]
    assert note.endswith("): this compares dense with dense")
    assert run_json(capsys, *asked[1:], "--config", folder / "config.json")["note"] is None
    patterned = (*asked[1:], "--config", "default", "--attention-backend", "streaming")
    assert run_json(capsys, *patterned)["note"] is None, "the pattern is not dense"
    assert main([*asked, "--config", str(folder / "config.json")]) == 0
    assert "ran dense" not in capsys.readouterr().out


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("tried to allocate 9 GiB")


def loaded(folder):
    model, tokenizer = load_model(str(folder / "model"))
    return model, tokenizer, encode_prompt(tokenizer, DOCUMENT, None)


@pytest.mark.parametrize("profile", [False, True])
def test_warming_up_reads_sparsely_at_the_shortest_length(folder, monkeypatch, profile):
    reports, apply = [], run.apply

    @contextlib.contextmanager
    def watched(*given, **named):
        with apply(*given, **named) as report:
            reports.append(report)
            yield report

    monkeypatch.setattr(run, "apply", watched)
    model, tokenizer, ids = loaded(folder)
    config = dataclasses.replace(CONFIG, crossover="auto")
    settings = LayerProfile(config, {1: {"drop_mass": 0.2}}) if profile else config
    run.warm_up(model, tokenizer, ids, settings)
    (report,) = reports
    records = report.last_prefill()
    expected = ["dense", "sparse", "dense"] if profile else ["sparse"] * 3
    assert [record.paths[0] for record in records] == expected
    assert all(record.kv_len == 16 + 32 + 1 for record in records)
    assert model.config._attn_implementation == "sdpa"
    reports.clear()
    run.warm_up(model, tokenizer, ids)
    assert not reports


@pytest.mark.parametrize(("whole", "expected"), [(False, 256), (True, 300)])
def test_warming_up_may_read_the_whole_prompt(folder, monkeypatch, whole, expected):
    model, tokenizer, ids = loaded(folder)
    assert ids.shape[1] == 300
    lengths, generate = [], model.generate

    def watched(ids, **options):
        lengths.append(ids.shape[1])
        return generate(ids, **options)

    monkeypatch.setattr(model, "generate", watched)
    run.warm_up(model, tokenizer, ids, whole=whole)
    assert lengths == [expected]


@pytest.mark.parametrize(
    ("config", "backend", "expected"),
    [
        (None, "math", "math"),
        (CONFIG, "math", "math"),
        (None, "streaming", "auto"),
        (CONFIG, "streaming", "streaming"),
    ],
)
def test_dense_and_sparse_runs_share_their_dense_kernel(
    folder, monkeypatch, config, backend, expected
):
    model, tokenizer, ids = loaded(folder)
    ran_on, every_layer = [], run.attention_of_every_layer

    def watched(model, attention_backend):
        ran_on.append(attention_backend.partition(":")[0])
        return every_layer(model, attention_backend)

    monkeypatch.setattr(run, "attention_of_every_layer", watched)
    answer(model, tokenizer, ids, config, max_new_tokens=1, attention_backend=backend)
    assert ran_on == [expected]
    assert model.config._attn_implementation == "sdpa"


def no_host_memory(*_, **__):
    torch.empty(2**57)


@pytest.mark.parametrize("full", [no_memory, no_host_memory])
@pytest.mark.parametrize("step", ["warm_up", "answer"])
def test_running_out_of_memory_is_a_failed_job(folder, capsys, monkeypatch, step, full):
    monkeypatch.setattr(run, step, full)
    asked = ("run", str(folder / "model"), "--prompt-file", str(folder / "document.txt"))
    capsys.readouterr()
    assert main([*asked, "--config", "published"]) == 1
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("tsa: out of memory at 300 prompt tokens, sparse: ")
    assert "tried to allocate" in error
    assert progress[0] == f"tsa: loading {folder / 'model'}"
    assert all(line.startswith("tsa: ") for line in progress)


def test_other_failures_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="something else"), within_memory(9, "sparse"):
        raise RuntimeError("something else")


def test_calibration_on_cuda_runs_dense_layers_on_the_kernels_of_sparse_ones(folder, monkeypatch):
    seen = []

    def calibrate(model, *_, **__):
        seen.append(model.config._attn_implementation)
        no_memory()

    monkeypatch.setattr(job, "calibrate", calibrate)
    asked = ["calibrate", str(folder / "model"), "--method", "drift", "--length", "90"]
    asked += ["--text", str(folder / "document.txt"), "--attention-backend", "efficient"]
    assert main(asked) == 1
    on_cuda = property(lambda _: torch.device("cuda"))
    monkeypatch.setattr(transformers.PreTrainedModel, "device", on_cuda)
    assert main(asked) == 1
    assert seen == ["sdpa", "dense_efficient"]


def test_calibration_and_the_demo_run_out_of_memory_too(folder, capsys, monkeypatch):
    monkeypatch.setattr(job, "calibrate", no_memory)
    asked = ["calibrate", str(folder / "model"), "--method", "drift", "--length", "90"]
    assert main([*asked, "--text", str(folder / "document.txt")]) == 1
    assert "out of memory at 90 prompt tokens, calibrating: tried" in capsys.readouterr().err
    monkeypatch.setattr(demo, "read", no_memory)
    assert main(["demo"]) == 1
    assert re.search("out of memory at .* prompt tokens, dense: tried", capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device must be the only one")
def test_a_device_map_takes_the_place_of_the_device(folder, capsys):
    asked = (folder / "model", "--prompt-file", folder / "document.txt", "--max-new-tokens", "5")
    plain = run_json(capsys, *asked)["sparse"]
    spread = run_json(capsys, *asked, "--device-map", "auto", "--device", "abacus")["sparse"]
    assert (spread["text"], spread["layers"]) == (plain["text"], plain["layers"])


def test_without_accelerate_a_device_map_is_bad_input(folder, capsys, monkeypatch):
    def no_accelerate(*_, **__):
        raise ImportError("device_map requires accelerate")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_accelerate)
    asked = ["run", str(folder / "model"), "--prompt-file", str(folder / "document.txt")]
    assert main([*asked, "--device-map", "auto"]) == 2
    assert "cannot be loaded: device_map requires accelerate" in capsys.readouterr().err


def test_the_demo_names_a_device_that_cannot_be_used(capsys):
    for device in ("abacus",) if torch.cuda.is_available() else ("abacus", "cuda"):
        assert main(["demo", "--device", device]) == 2
        assert "the bundled model cannot be loaded: " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "calibrate", "capture"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("publishd", "publishd cannot be used: there is no file 'publishd'; did you mean"),
        ('{"drop": 1}', '{"drop": 1} cannot be used: config has an unknown entry'),
        ("runs/a=b.json", "there is no file 'runs/a=b.json'"),
        ("dense", "there is no file 'dense'"),
        ("flexprefill", "a block-sparse pattern holds no settings of token sparsity"),
        ("profile", "has no token_sparse_profile.json"),
    ],
)
def test_settings_that_cannot_be_used_are_named(folder, tmp_path, capsys, command, value, message):
    document = str(folder / "document.txt")
    given = {
        "run": ["--prompt-file", document],
        "capture": ["--prompt-file", document, "--out", str(tmp_path / "kept.json")],
        "calibrate": ["--method", "drift", "--text", document],
    }
    asked = [command, str(folder / "model"), *given[command]]
    assert main([*asked, "--config", value]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tsa: --config ")
    assert message in error


def test_info_loads_no_heavy_packages():
    code = (
        "import sys; from token_sparse_attention.cli import main; main(['info', '--json']);"
        "print([name for name in ('transformers', 'lm_eval') if name in sys.modules],"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_reading_settings_loads_no_transformers():
    code = (
        "import sys; from token_sparse_attention.settings import read_settings;"
        "print(read_settings('published', 'model').drop_mass, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--prompt-file": "absent.txt"}, "--prompt-file absent.txt cannot be read"),
        ({"--prompt-file": "EMPTY"}, "must hold text, but is empty"),
        ({"--config": "absent.json"}, "--config absent.json cannot be used"),
        ({"--config": "BROKEN"}, "is not valid JSON"),
        ({"--config": "UNKNOWN"}, "unknown entry 'num_sample'; did you mean 'num_samples'"),
        ({"--config": "OLD"}, "OLD has the field names of version 1; rewrite it with "),
        ({"--config": "LAYERS"}, "sparse_layers must be below 3"),
        ({"--attention-backend": "cudnn"}, "attention_backend 'cudnn' cannot run"),
        ({"--device": "abacus"}, "cannot be loaded"),
        pytest.param(
            {"--device": "cuda"},
            "cannot be loaded",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"--config": "publshed"}, "did you mean 'published'"),
        ({"model": "no/such-model"}, "no/such-model cannot be loaded"),
        ({"model": "PICKLE"}, "cannot be loaded"),
        ({"model": "REMOTE"}, "cannot be loaded"),
    ],
)
def test_bad_input_exits_2_and_names_it(folder, capsys, tmp_path, change, message):
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "BROKEN").write_text("{")
    (tmp_path / "UNKNOWN").write_text('{"num_sample": 1}')
    (tmp_path / "LAYERS").write_text('{"sparse_layers": [5], "sink_size": 0}')
    (tmp_path / "OLD").write_text('{"window_size": 8}')
    pickled = tmp_path / "PICKLE"
    make_model().save_pretrained(pickled)
    make_tokenizer().save_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), pickled / "pytorch_model.bin")
    remote = tmp_path / "REMOTE"
    make_tokenizer().save_pretrained(remote)
    settings = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    }
    (remote / "config.json").write_text(json.dumps(settings))
    (remote / "own.py").write_text("raise SystemExit('remote code ran')")

    arguments = {
        "--prompt-file": str(folder / "document.txt"),
        "--config": str(folder / "config.json"),
        "model": str(folder / "model"),
    } | {
        option: str(tmp_path / value) if (tmp_path / value).exists() else value
        for option, value in change.items()
    }
    model = arguments.pop("model")
    flat = [part for pair in arguments.items() for part in pair]
    capsys.readouterr()  # what making the models printed
    assert main(["run", model, *flat]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tsa: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "--prompt-file", "x", "--max-new-tokens", "0"],
        ["run", "--prompt-file", "x", "--impl", "magic"],
        ["run", "--prompt-file", "x", "--attention-backend", "magic"],
        ["run", "--prompt-file", "x", "--attention-backend", 'flexprefill:{"gama": 1}'],
    ],
)
def test_bad_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: tsa" in capsys.readouterr().err


def test_run_takes_a_pattern_in_every_layer(folder, capsys, monkeypatch):
    seen = []
    pattern = PATTERNS["streaming"]

    def run(query, *arguments, **settings):
        seen.append(query.shape[2])
        return pattern.run(query, *arguments, **settings)

    monkeypatch.setitem(PATTERNS, "streaming", pattern._replace(run=run))
    config = folder / "one-layer.json"
    config.write_text(dataclasses.replace(CONFIG, sparse_layers=(1,)).to_json())
    asked = ("--config", config, "--attention-backend", 'streaming:{"local_size": 99}')
    result = run_json(
        capsys,
        *(folder / "model", "--prompt-file", folder / "document.txt", "--compare"),
        *("--max-new-tokens", "2", *asked),
    )
    assert result["attention_backend"] == 'streaming:{"local_size":99}'
    assert [layer["paths"] for layer in result["sparse"]["layers"]] == [
        ["dense"],
        ["sparse"],
        ["dense"],
    ]
    kept = result["sparse"]["layers"][1]["kept"][0][0]
    assert seen == [300, kept, 300], "every layer of the sparse prefill, and nothing else"


@pytest.mark.parametrize("command", ["run", "demo", "info"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"example:\n  tsa {command}" in printed
    assert "--json" in printed


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["devices"][0]["device"] == "cpu"
    for entry in facts["backends"]["cpu"]:
        assert entry["auto"] in entry["available"]
        assert entry["reason"]
        assert "cudnn" not in entry["available"]
        assert entry["patterns_on"] == "reference"
    assert main(["info"]) == 0
    assert "auto picks" in capsys.readouterr().out


def test_the_command_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "token_sparse_attention.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("tsa 0.")
