"""The commands for models that cannot be had here, on the bundled one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from token_sparse_attention.bundled import MODEL

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "published-ruler.sh"
NAMES = ["samples-2048", "samples-4096", "flexprefill", "minference", "xattention"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_published_table_is_filled_from_end_to_end(tmp_path):
    pytest.importorskip("lm_eval")
    small = {"LENGTHS": "1024", "LIMIT": "1", "TASKS": "niah_single_1", "PIECES": "1"}
    where = {"OUT": str(tmp_path), "TSA": str(Path(sys.executable).with_name("tsa"))}
    done = subprocess.run(
        ["bash", str(SCRIPT), str(MODEL)],
        env={**os.environ, **small, **where},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("ruler", "fidelity"):
        told = json.dumps(lines(tmp_path / MODEL.name / f"{name}.jsonl"))
        assert all(f'"{each}"' in told for each in ("dense", *NAMES)), name


def test_help_needs_nothing():
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: scripts/published-ruler.sh")
