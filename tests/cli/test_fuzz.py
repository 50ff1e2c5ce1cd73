"""Malformed arguments and files of every kind: one line on standard error, and exit code 1 or 2.

No model is loaded, so all that is said comes from reading and checking what was given.
"""

from __future__ import annotations

import functools
import gzip
import json
import random
from collections.abc import Iterator

import pytest

from calibration.test_record import RESULT as MEASURED
from evaluation.results import DENSE, HEADER, SPARSE
from fidelity.test_summary import HEADER as FIDELITY
from fidelity.test_summary import RESULTS
from report.pages import KEPT
from studies.synthetic import op_result
from token_sparse_attention import KVSamplingConfig, LayerProfile, TokenSelectionConfig
from token_sparse_attention.cli import BAD_INPUT, FAILED, commands, main
from token_sparse_attention.cli.commands import BENCHMARKS, COMMANDS
from token_sparse_attention.errors import UsageError
from token_sparse_attention.evaluation.samples import Sample, SampleSet
from token_sparse_attention.records import encode

SEED, PER_FILE, PER_COMMAND = 20, 200, 200
WORDS = [
    "", " ", "-", "--", "-1", "0", "nan", "inf", "1e999", "9" * 5000, "1,,x", ",", "null", "é",
    "\udce9", "a\nb", "a\tb", "%s %(x)d", "{", "{}", "[]", '{"a":', "[" * 50_000, "a" * 300, "/",
    ".", "..", "/dev/null/x", "/proc/self/mem", "dense", "x=", "=x", "x={", "x=[1]", "streaming:{",
    "streaming+", "streaming:" + "[" * 50_000, "x=streaming:" + '{"a":' * 20_000,
    'flexprefill:{"gamma": NaN}', 'flexprefill:{"gamma": 1e999}', "streaming:" + "9" * 5000,
    '{"num_samples": 1, "num_samples": 2}', "streaming:{}+{}", 'flexprefill:{"gamma": "x"}',
    "\u202e", "\x1b[31m", "--json=1", "--help=1",
]  # fmt: skip
PARSER = functools.cache(commands.build_parser)
PROGRESS = ("tsa: loading", "tsa: preparing", "tsa: importing", "tsa: starting")
VALUES = [
    None, True, -1, 0, 1.5, 1e308, 10**400, "", "x", "\ud83d", [], {}, [None], {"": None}, [[1]],
    -0.0, "9" * 5000, {"version": 2}, [{}], "NaN",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    """Stand in for what takes long: whoever gets there had good input."""

    def load(*_, **__):
        raise UsageError("nothing is loaded here")

    for name in (
        "token_sparse_attention.run.load_model",
        "transformers.AutoTokenizer.from_pretrained",
        "token_sparse_attention.demo.run_demo",
        "token_sparse_attention.info.collect",
        "token_sparse_attention.benchmark.op.measure",
        "token_sparse_attention.benchmark.prefill.measure",
    ):
        monkeypatch.setattr(name, load)
    monkeypatch.setattr(commands, "build_parser", PARSER)  # built once, as in a process
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("Some words that are read.")


def said(capsys, words, *, maybe_good=False) -> str | None:
    """Run a command that must fail; return the line that it says.

    With `maybe_good` it may succeed as well, and then says nothing: None.
    """
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stopped:
        code = stopped.code
    lines = [
        line for line in capsys.readouterr().err.split("\n")[:-1] if not line.startswith(PROGRESS)
    ]
    if maybe_good and code == 0:
        assert not lines, (words, lines)
        return None
    assert code in (FAILED, BAD_INPUT), (words, code)
    assert len(lines) == 1, (words, lines)
    assert lines[0].startswith("tsa"), (words, lines)
    assert len(lines[0]) < 2100, (words, len(lines[0]))
    assert "\x1b" not in lines[0], (words, lines)
    assert "unexpected " not in lines[0].partition(":")[2][:12], (words, lines)
    return lines[0]


def options_of(command) -> list[str]:
    parser = PARSER()
    for word in command:
        below = next(action for action in parser._actions if isinstance(action.choices, dict))
        parser = below.choices[word]
    return [action.option_strings[-1] for action in parser._actions if action.option_strings]


NAMES = [(command.name,) for command in COMMANDS] + [("bench", b.name) for b in BENCHMARKS]
ENOUGH = {  # arguments without which nothing else is looked at
    "run": ["--prompt-file", "text"],
    "calibrate": ["--method", "drift", "--text", "text"],
    "eval": ["--out", "result.jsonl"],
    "report": ["text", "--out", "page.html"],
    "capture": ["--prompt-file", "text", "--out", "kept.json"],
}


@pytest.mark.parametrize("command", NAMES, ids=" ".join)
def test_arguments(capsys, command):
    chosen = random.Random(f"{SEED} {command}")
    names = [name for name in options_of(command) if name not in ("--help", "--json")]
    names.append("--absent")
    heard = set()
    for number in range(PER_COMMAND):
        given = [*command, *(ENOUGH.get(command[-1], []) if number % 4 else [])]
        for _ in range(chosen.randint(1, 3)):
            given += [chosen.choice(names), chosen.choice(WORDS)][: chosen.choice((1, 2, 2, 2))]
        heard.add(said(capsys, given).partition(": ")[2][:40])
    assert len(heard) > 3, "the arguments are all refused for one reason"


def broken(whole: bytes, chosen: random.Random) -> bytes:
    """Return a file's bytes with a fault: cut off, or some bytes lost, changed or added."""
    at = chosen.randrange(len(whole))
    noise = bytes(chosen.randrange(256) for _ in range(chosen.randint(1, 4)))
    return chosen.choice(
        (
            whole[:at],
            whole[:at] + noise + whole[at:],
            whole[:at] + noise + whole[at + len(noise) :],
            noise + whole,
            gzip.compress(whole, mtime=0)[: at + 5],
            whole.decode().encode("utf-16"),
            b"[" * 100_000,
            b"",
        )
    )


def wrong(content, chosen: random.Random):
    """Return JSON with one entry, anywhere, replaced, lost or added."""
    if not isinstance(content, (dict, list)) or not content or chosen.random() < 0.2:
        return chosen.choice(VALUES)
    changed = content.copy()
    key = chosen.choice(list(content) if isinstance(content, dict) else range(len(content)))
    kind = chosen.random()
    if kind < 0.15:
        del changed[key]
    elif kind < 0.3 and isinstance(content, dict):
        changed[f"{key}x"] = changed.pop(key)
    else:
        changed[key] = wrong(content[key], chosen)
    return changed


def files(lines: list, chosen: random.Random) -> Iterator[bytes]:
    """Yield malformed variants of a file whose lines hold JSON."""
    whole = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    for number in range(PER_FILE):
        if number % 2:
            yield broken(whole, chosen)
        else:
            at = chosen.randrange(len(lines))
            changed = [*lines[:at], wrong(lines[at], chosen), *lines[at + 1 :]]
            yield b"".join(json.dumps(line).encode() + b"\n" for line in changed)


PROFILE = LayerProfile(KVSamplingConfig(), {1: {"num_samples": 64}, 2: {"dense_heads": [1]}})
SAMPLES = SampleSet("0", "bundled", False, 0, [], 1, {"task": 1}, [])
SAMPLE = Sample("task", 0, 0, "Words.", ["."], 6, {"answer": "7"})
BENCHMARK = op_result()
PROMPTS = "calibrate --method drift --prompts FILE"
KINDS = {  # the lines of a file, and a command that reads it
    "sampling": ([KVSamplingConfig().to_dict()], "run --prompt-file text --config FILE"),
    "selection": ([TokenSelectionConfig().to_dict()], "eval --out out --config FILE"),
    "profile": ([PROFILE], "capture --prompt-file text --out out --config FILE"),
    "samples": ([SAMPLES, SAMPLE], "eval --samples FILE --out out"),
    "results": ([HEADER, DENSE, SPARSE], "report FILE --out page.html"),
    "unfinished results": ([HEADER, DENSE, SPARSE], "eval --out FILE"),
    "unfinished fidelity": ([FIDELITY, *RESULTS.answers[:2]], "fidelity --out FILE"),
    "fidelity's settings": ([PROFILE], "fidelity --config FILE"),
    "fidelity's text": (["Some words."], "fidelity --text FILE"),
    "capture": ([KEPT], "report FILE --out page.html"),
    "benchmark": ([BENCHMARK], "report FILE --out page.html"),
    "measured": (
        [MEASURED], "calibrate --method both --divergence-budget 1 --measured FILE --out out",
    ),
    "prompts": ([{"prompt": "Words.", "continuation": "More."}], PROMPTS),
    "text": (["Some words."], "run --prompt-file FILE"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_files(capsys, tmp_path, kind):
    lines, command = KINDS[kind]
    lines = [json.loads(encode(line)) for line in lines]
    chosen = random.Random(f"{SEED} {kind}")
    refused = 0
    for number, content in enumerate(files(lines, chosen)):
        path = tmp_path / f"file{number}.json"
        path.write_bytes(content)
        words = [str(path) if word == "FILE" else word for word in command.split()]
        refused += said(capsys, words, maybe_good=True) is not None
    assert refused > PER_FILE / 2, "most are malformed"
