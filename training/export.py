"""Writing a trained model as a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from .tokenizer import END_ID, PAD_ID


def export(model: PreTrainedModel, data: Path, folder: Path) -> None:
    """Save weights (bfloat16, tied embeddings once), configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    half = copy.deepcopy(model).to("cpu", torch.bfloat16)
    half.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=48, eos_token_id=END_ID, pad_token_id=PAD_ID
    )
    half.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    # Where transformers before version 5 looks for it.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data / name, folder / name)
