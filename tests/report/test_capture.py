"""The captured positions are those that ran; from the model to the page."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from cli.commands import run
from integrations.models import CONFIG, LAYERS, SAMPLING, make_ids, make_model
from support import WITH_SELECTION
from token_sparse_attention import LayerProfile, bundled
from token_sparse_attention.attention.patterns.streaming import StreamingConfig
from token_sparse_attention.errors import UsageError
from token_sparse_attention.integrations import layers
from token_sparse_attention.integrations.transformers import apply
from token_sparse_attention.report.capture import capture, token_texts
from token_sparse_attention.report.kept_text import KeptText
from token_sparse_attention.run import answer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled.MODEL)


@pytest.fixture
def selections(monkeypatch):
    """Every selection that the integration attends over and its tokens, noted where it is made."""
    made = []
    attend = layers.token_sparse_attention

    def noting(*args, **kwargs):
        result = attend(*args, **kwargs | {"return_aux": WITH_SELECTION})
        made.append(result.selection)
        return result

    monkeypatch.setattr(layers, "token_sparse_attention", noting)
    return made


def positions(mask: str) -> list[int]:
    number = int.from_bytes(base64.b64decode(mask), "little")
    return [i for i in range(number.bit_length()) if number >> i & 1]


WINDOWED = dataclasses.replace(CONFIG, fallback="window", sliding_window=9)
KINDS = {
    "shared": WINDOWED,
    "per head": dataclasses.replace(WINDOWED, budget="per_head"),
    "samples": dataclasses.replace(SAMPLING, num_samples=20, dense_queries=0),
    "samples, per head": dataclasses.replace(
        SAMPLING, num_samples=20, sink_size=0, dense_queries=0, budget="per_head"
    ),
    "window only": dataclasses.replace(SAMPLING, num_samples=0, sink_size=0, dense_queries=0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_captured_positions_are_those_that_ran(tokenizer, selections, kind, implementation):
    model = make_model()
    model.set_attn_implementation(implementation)
    config = dataclasses.replace(KINDS[kind], sparse_layers=(0, 2))
    ids = make_ids(203)
    kept = capture(model, tokenizer, ids, config, arguments={}, max_new_tokens=3)
    assert len(kept.layers) == LAYERS
    assert len(kept.tokens) == 203
    assert "not among the sparse layers" in kept.layers[1].dense_reason
    for layer, selection in zip((0, 2), selections, strict=True):
        heads = [[i for i in row if i >= 0] for row in selection.indices[0].tolist()]
        assert [positions(mask) for mask in kept.layers[layer].masks] == heads
        assert min(map(len, heads)) < 203
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(("sink_size", "num_samples"), [(0, 0), (2, 30)])
@pytest.mark.parametrize("budget", ["shared", "per_head"])
def test_sampled_keys_are_captured(tokenizer, selections, sink_size, num_samples, budget):
    config = dataclasses.replace(
        SAMPLING,
        sliding_window=32,
        sink_size=sink_size,
        num_samples=num_samples,
        budget=budget,
        dense_queries=0,
        sparse_layers=(0, 2),
    )
    kept = capture(make_model(), tokenizer, make_ids(203), config, arguments={}, max_new_tokens=3)
    assert [layer.beyond_window for layer in kept.layers] == [True, False, True]
    for layer, selection in zip((0, 2), selections, strict=True):
        heads = [[i for i in row if i >= 0] for row in selection.indices[0].tolist()]
        assert [positions(mask) for mask in kept.layers[layer].masks] == heads
        assert all((10 < len(own) < 130) if num_samples else not own for own in heads)
    assert KeptText.from_dict(json.loads(kept.to_json()), "kept") == kept


def test_capture_changes_no_reply(tokenizer):
    model, ids = make_model(), make_ids(150)
    kept = capture(model, tokenizer, ids, CONFIG, arguments={}, max_new_tokens=5)
    with apply(model, CONFIG):
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
    assert kept.reply == tokenizer.decode(generated[0, 150:], skip_special_tokens=True).strip()


def test_a_pattern_runs_in_every_layer_of_a_captured_prompt(tokenizer, selections):
    model, ids = make_model(), make_ids(203)
    config = dataclasses.replace(CONFIG, sparse_layers=(0, 2))
    pattern = StreamingConfig(sink_size=0, local_size=1)  # one block: some replies change
    kept = capture(model, tokenizer, ids, config, arguments={}, attention_backend=pattern)
    for layer, selection in zip((0, 2), selections, strict=True):
        heads = [[i for i in row if i >= 0] for row in selection.indices[0].tolist()]
        assert [positions(mask) for mask in kept.layers[layer].masks] == heads
    answers = {
        backend: answer(
            model, tokenizer, ids, config, max_new_tokens=32, attention_backend=backend
        ).text
        for backend in (pattern, "auto")
    }
    assert kept.reply == answers[pattern] != answers["auto"]


def test_short_prompts_are_captured_as_dense(tokenizer):
    kept = capture(
        make_model(), tokenizer, make_ids(40), LayerProfile(CONFIG, {1: {}}), arguments={}
    )
    assert [layer.masks for layer in kept.layers] == [(), (), ()]
    assert "context too short" in kept.layers[1].dense_reason


@pytest.mark.parametrize(
    "text",
    [
        "Plain words, numbers 12345 and\n\n  indented lines.\t\tTabs",
        "Umlaute äöü, 漢字かな交じり文, emoji 👩‍👩‍👧‍👦🏳️‍🌈, mathematics ∑∂√",
        " \ufffd literally, and at the end \ufffd",
        "<|im_start|> as text </script>",
    ],
)
def test_token_texts_make_up_the_prompt(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    for end in (len(ids), len(ids) - 1):  # the last token may be part of a character
        pieces = token_texts(tokenizer, ids[:end])
        assert len(pieces) == end
        whole = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        assert "".join(pieces) == whole


class WordTokenizer:
    """Decodes like those that drop the space before a text's first word."""

    words = (" Some", " words", "and", " more", ".")

    def decode(self, ids, **_):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_token_texts_keep_the_spaces_that_decoding_a_token_alone_drops():
    assert token_texts(WordTokenizer(), [0, 1, 2, 3, 4]) == ["Some", " words", "and", " more", "."]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(vocab_size=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.MODEL / name, folder)
    return str(folder)


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("A <b>bold</b> claim about tokens & text. " * 12, encoding="utf-8")
    return str(path)


def test_commands_go_from_a_prompt_to_a_page(model_folder, prompt, tmp_path, capsys):
    kept, page = tmp_path / "new" / "kept.json", tmp_path / "report.html"
    asked = ("--question", "Which <i>claim</i>?", "--config", CONFIG.to_json())
    asked += ("--attention-backend", "streaming")
    assert run("capture", model_folder, "--prompt-file", prompt, *asked, "--out", kept) == 0
    assert "3 sparse layers" in capsys.readouterr().out
    content = KeptText.from_dict(json.loads(kept.read_text(encoding="utf-8")), "kept")
    assert "A <b>bold</b> claim" in "".join(content.tokens)
    assert content.arguments["config"] == CONFIG.to_dict()
    assert content.arguments["model"] == model_folder
    assert content.arguments["attention_backend"] == "streaming"
    assert run("report", kept, "--out", page, "--json") == 0
    assert json.loads(capsys.readouterr().out)["captures"] == 1
    html = page.read_text(encoding="utf-8")
    assert "Which &lt;i&gt;claim&lt;/i&gt;?" in html
    assert "<b>bold" not in html


def test_capture_says_when_nothing_ran_sparse(model_folder, prompt, tmp_path, capsys):
    out = tmp_path / "kept.json"
    assert run("capture", model_folder, "--prompt-file", prompt, "--out", out, "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["sparse_layers"] == []
    assert "no layer ran sparse: context too short" in shown.err


def test_bad_input_is_named(model_folder, prompt, tmp_path):
    out = ("--out", tmp_path / "out")
    with pytest.raises(UsageError, match=r"--prompt-file .*absent cannot be read"):
        run("capture", "--prompt-file", tmp_path / "absent", *out)
    with pytest.raises(UsageError, match="did you mean 'published'"):
        run("capture", model_folder, "--prompt-file", prompt, "--config", "publishd", *out)
    bad = '{"num_samples": -2}'
    with pytest.raises(UsageError, match="num_samples must be at least 0"):
        run("capture", model_folder, "--prompt-file", prompt, "--config", bad, *out)
    layers = '{"sparse_layers": [7]}'
    with pytest.raises(UsageError, match="below 3, the model's number of layers"):
        run("capture", model_folder, "--prompt-file", prompt, "--config", layers, *out)
    with pytest.raises(UsageError, match="absent cannot be loaded"):
        run("capture", str(tmp_path / "absent"), "--prompt-file", prompt, *out)
    with pytest.raises(UsageError, match="must be another file: this one is read"):
        run("report", prompt, "--out", prompt)
    kept = tmp_path / "kept.json"
    run("capture", model_folder, "--prompt-file", prompt, "--out", kept)
    with pytest.raises(UsageError, match="cannot be written"):
        run("report", kept, "--out", tmp_path)
