"""Tensor parallelism: two ranks with half of the heads each say what one with all says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import vllm_plugin.engines
from token_sparse_attention.integrations.serving.counters import COUNTERS, describe
from vllm_plugin.engines import additional_config, gained, generate, prompt_ids

pytestmark = pytest.mark.vllm
LENGTHS = (900, 1777)
SCRIPT = """
import json, sys
from vllm_plugin import engines
from vllm_plugin.engines import additional_config, generate, prompt_ids, start_engine
if __name__ == "__main__":
    given = additional_config(config=engines.{config}.to_dict())
    engine = start_engine(tensor_parallel_size=2, additional_config=given)
    prompts = [prompt_ids(length, seed) for seed, length in enumerate({lengths})]
    print("REPLIES", json.dumps([generate(engine, [ids])[0] for ids in prompts]))
"""


@pytest.mark.parametrize("config", ["CONFIG", "SAMPLING", "HEADS"])
def test_two_ranks_say_what_one_says(engines, tmp_path, config):
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT.format(lengths=LENGTHS, config=config))
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "INFO"}
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
    given = additional_config(config=getattr(vllm_plugin.engines, config).to_dict())
    one = engines(additional_config=given)
    before = COUNTERS.read()
    expected = [
        generate(one, [prompt_ids(length, seed)])[0] for seed, length in enumerate(LENGTHS)
    ]
    after = COUNTERS.read()
    assert replies == expected
    # Each rank counts its own heads, so shares are equal and only the first rank reports.
    gain = gained(before, after) | {"prefills_dense": {}}
    assert describe(gain) in printed
