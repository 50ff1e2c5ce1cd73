"""The training code still trains: one tiny model, from data to a folder that loads and a card."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from token_sparse_attention import KVSamplingConfig, LayerProfile, bundled
from token_sparse_attention.profile import PROFILE_FILE

ROOT = Path(__file__).parent.parent


@contextmanager
def training_importable():
    sys.path.insert(0, str(ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prepared data as `training.prepare` writes it, from the demo document alone."""
    with training_importable():
        from training.prepare import find_cuts
    folder = tmp_path_factory.mktemp("data")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.MODEL / name, folder)
    coder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = bundled.DEMO_DOCUMENT.read_text(encoding="utf-8")
    ids = np.array(coder.encode(text).ids * 40, dtype=np.uint16)
    np.save(folder / "prose.npy", ids)
    np.save(folder / "cuts.npy", find_cuts(coder, ids))
    starts, ends = ("dark", "pale", "wild", "moon", "wood", "rain"), ("er", "ish", "light", "land")
    words = {
        "adjectives": [f"{a}{b}" for a in starts for b in ends],
        "nouns": [f"{a}{b}{c}" for a in starts for b in starts for c in ends],
    }
    (folder / "words.json").write_text(json.dumps(words))
    (folder / "held_out.txt").write_text(text)
    (folder / "sources.json").write_text("[]")
    return folder


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_rows_equal_the_tokens_of_their_text(data):
    assert "0 of" in run("training.check", "--data", data)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_training_pass_is_the_stock_models(architecture):
    with training_importable():
        from training.network import Forward, make_config, make_model
    model = make_model(make_config(architecture, layers=2), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    tokens = torch.randint(2, 4096, (2, 40), generator=torch.manual_seed(2))
    positions = torch.arange(40).expand(2, -1) * 3
    targets = tokens.roll(-1, 1)
    with torch.no_grad():
        losses, right = Forward(model, torch.float32, False)(tokens, positions, targets)
        logits = model(tokens, position_ids=positions, attention_mask=torch.ones(2, 40)).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(right, logits.flatten(0, 1).argmax(-1) == targets.flatten())


def test_training_makes_a_model_that_loads(data, tmp_path):
    run(
        *("training", "--data", data, "--out", tmp_path, "--minutes", "0.05", "--layers", "1"),
        *("--stages", "256:1", "--micro-batch", "1024", "--accumulate", "1", "--workers", "1"),
        *("--samples", "1", "--lengths", "512"),
    )
    trained = json.loads((tmp_path / "training.json").read_text())
    assert [one["run"] for one in trained["runs"]] == ["base", "long"]
    assert all(one["steps"] >= 1 for one in trained["runs"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        logits = model(tokenizer("a line of text", return_tensors="pt")["input_ids"]).logits
    assert logits.isfinite().all()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["samples"] == 1
    assert "512" in scores["right"]["single_1"]


def test_two_processes_train_one_model(data, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        f"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, {str(ROOT)!r})
from training import ranks
from training.train import Options, Trainer

rank, world = ranks.join()
parameter = torch.nn.Parameter(torch.zeros(2, 3))
parameter.grad = torch.full((2, 3), 1.0 + rank)
assert ranks.average([parameter], 10.0 + rank) == 10.5
assert (parameter.grad == 1.5).all()

options = Options(
    Path({str(data)!r}), minutes=0.05, stages=((256, 1.0),), micro_batch=1024, accumulate=2,
    workers=1, layers=1, rank=rank, world=world,
)
trainer = Trainer(options, "cpu")
trainer.run()
own = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
both = [torch.empty_like(own) for _ in range(world)]
torch.distributed.all_gather(both, own)
assert trainer.step >= 1 and trainer.tokens == 2048 * trainer.step
assert torch.equal(both[0], both[1])
print(f"rank {{rank}} took {{trainer.step}} steps")
ranks.leave()
"""
    )
    said = run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    steps = {line.split()[3] for line in said.splitlines() if line.startswith("rank")}
    assert len(steps) == 1


def test_processes_must_share_a_step_evenly(data):
    with training_importable():
        from training.train import Options
    with pytest.raises(ValueError, match=r"divisible by the 2 processes.*got 3"):
        Options(data, accumulate=3, world=2)


def test_the_card_is_what_the_results_say(tmp_path):
    for name in ("config.json", "model.safetensors", PROFILE_FILE):
        shutil.copy(bundled.MODEL / name, tmp_path)
    run("training.card", "--model", tmp_path)
    assert (tmp_path / "README.md").read_text() == (bundled.MODEL / "README.md").read_text()


def test_the_card_refuses_a_profile_that_the_results_are_not_of(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bundled.MODEL / name, tmp_path)
    other = LayerProfile(KVSamplingConfig(), {0: {"dense_heads": (4,)}})
    (tmp_path / PROFILE_FILE).write_text(other.to_json())
    with training_importable():
        from training import card
    lines = gzip.decompress((card.MEASURED / "selection/bundled/64k.jsonl.gz").read_bytes())
    header, rows = lines.split(b"\n", 1)
    settings = json.loads((bundled.MODEL / PROFILE_FILE).read_text())
    changed = json.loads(header)
    changed["configurations"]["profile"] = settings
    results = [tmp_path / "replies.jsonl"]
    results[0].write_bytes(json.dumps(changed).encode() + b"\n" + rows)
    with pytest.raises(ValueError, match="must be the shipped profile"):
        card.make_card(
            card.RESULTS / "ruler.jsonl.gz", card.RESULTS / "training.json", tmp_path, results, []
        )
