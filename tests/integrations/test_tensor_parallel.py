"""Tensor parallel models: two ranks select and compute what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from integrations import tensor_parallel_ranks
from integrations.models import CONFIG, LAYERS, make_model
from integrations.tensor_parallel_ranks import CASES, FAMILIES, UNEQUAL, run_batched, run_case
from token_sparse_attention.integrations.transformers import apply

RANKS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models on disk, and the results of two ranks that ran them."""
    folder = tmp_path_factory.mktemp("models")
    for family, changes in FAMILIES.items():
        architecture = "Llama" if family == UNEQUAL else family
        model = make_model(architecture, vocab_size=200, **changes)
        for name, weight in model.named_parameters():  # sharp attention: heads that differ
            if name.endswith(("q_proj.weight", "q_norm.weight")):
                weight.data.mul_(20)
        model.save_pretrained(folder / family)
    script = Path(tensor_parallel_ranks.__file__)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={RANKS}", str(script), str(folder),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(folder, ranks, name):
    family, config, padded = CASES[name]
    model = AutoModelForCausalLM.from_pretrained(folder / family).eval()
    expected = run_case(model, config, padded)
    assert all(None in reasons for reasons in expected["reasons"]), "the case runs sparse"
    mine = [rank[name] for rank in ranks]
    for rank in mine:
        torch.testing.assert_close(rank["logits"], expected["logits"], rtol=1e-3, atol=3e-4)
        assert rank["new"] == expected["new"]
        assert rank["reasons"] == expected["reasons"]
        assert len(rank["text"].splitlines()) == 1 + LAYERS
    for layer, kept in enumerate(expected["kept"]):
        if name == "gathered":
            assert all(rank["kept"][layer] == kept for rank in mine)
            continue
        for row, heads in enumerate(kept):
            assert [n for rank in mine for n in rank["kept"][layer][row]] == heads


def test_ranks_batch_requests_as_one_process_does(folder, ranks):
    model = AutoModelForCausalLM.from_pretrained(folder / "Llama").eval()
    tokens, kept = run_batched(model)
    for rank in ranks:
        assert rank["batched"][0] == tokens
    parts = zip(*(rank["batched"][1] for rank in ranks))
    assert [[first[0] + second[0]] for first, second in parts] == kept


def test_without_an_exchange_the_ranks_would_keep_other_numbers(ranks):
    first, second = (rank["not exchanged"] for rank in ranks)
    assert first != second


def test_heads_that_do_not_divide_into_the_ranks_are_refused(ranks):
    for rank in ranks:
        assert "multiple of its 2 tensor parallel ranks as num_key_value_heads" in rank[UNEQUAL]


def test_a_split_model_without_a_mesh_is_refused():
    model = make_model()
    model._tp_size = 2
    with pytest.raises(ValueError, match="model must carry the device mesh"):
        apply(model, CONFIG)
