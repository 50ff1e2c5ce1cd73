#!/usr/bin/env bash
# Build the wheel, install it into an empty environment, and use it outside the clone:
# first the core alone, then with the transformers extra, whose demo must pass.
set -euo pipefail
python=${1:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel -q --no-deps -w "$work" "$root"
"$python" -m venv "$work/env"
cd "$work"
wheel=$(ls token_sparse_attention-*.whl)
env/bin/python -m pip install -q -c "$root/constraints.txt" torch
env/bin/python -m pip install -q -c "$root/constraints.txt" "$wheel"
env/bin/python - <<'PYTHON'
import importlib.util

import torch

import token_sparse_attention as tsa

assert importlib.util.find_spec("transformers") is None
query = torch.randn(1, 4, 400, 32)
config = tsa.KVSamplingConfig(
    block_size=64, num_probes=32, sliding_window=64, num_samples=100, crossover="off"
)
aux = tsa.AuxRequest(selection=True)
_, selection, _ = tsa.token_sparse_attention(query, query, query, config, return_aux=aux)
assert selection.ran_sparse.all()
print("core works without transformers from", tsa.__file__)
PYTHON
if env/bin/tsa demo 2>message; then echo "tsa demo must need the extra" >&2; exit 1; fi
grep -q "pip install 'token-sparse-attention\[transformers\]'" message
env/bin/python -m pip install -q -c "$root/constraints.txt" "$wheel[transformers]"
env/bin/tsa info
env/bin/tsa demo
