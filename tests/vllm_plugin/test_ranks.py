"""Tensor parallelism: two ranks with half of the heads each say what one with all says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from token_sparse_attention.integrations.vllm.counters import COUNTERS, describe
from vllm_plugin.engines import generate, prompt_ids

pytestmark = pytest.mark.vllm
LENGTHS = (900, 1777)
SCRIPT = """
import json, sys
from vllm_plugin.engines import generate, prompt_ids, start_engine
if __name__ == "__main__":
    engine = start_engine(tensor_parallel_size=2)
    prompts = [prompt_ids(length, seed) for seed, length in enumerate({lengths})]
    print("REPLIES", json.dumps([generate(engine, [ids])[0] for ids in prompts]))
"""


def test_two_ranks_say_what_one_says(engines, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT.format(lengths=LENGTHS))
    here = os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"PYTHONPATH": here, "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    replies = json.loads(re.search(r"REPLIES (.*)", printed).group(1))
    before = COUNTERS.read()
    expected = [
        generate(engines(), [prompt_ids(length, seed)])[0] for seed, length in enumerate(LENGTHS)
    ]
    after = COUNTERS.read()
    assert replies == expected
    # Each rank counts its own heads, so shares are equal and only the first rank reports.
    gained = {name: after[name] - before[name] for name in after if name != "prefills_dense"} | {
        "prefills_dense": {}
    }
    assert describe(gained) in printed
