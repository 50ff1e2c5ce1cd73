"""Families x ways to run a model: what each gives, and what `apply` makes of each layer.

PYTHONPATH=tests python -m integrations.matrix  writes the result file that docs/supported.md shows
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel, pipeline

from integrations.families import FAMILIES
from integrations.models import CONFIG, SAMPLING, WORDS, make_ids, make_model, make_tokenizer
from token_sparse_attention.integrations.transformers import apply

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results" / "families"
RESULT = FOLDER / f"transformers-{transformers.__version__}.json"
LENGTH = 72
NEW = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
EVERYTHING = {
    "kv_sampling": dataclasses.replace(SAMPLING, num_samples=1600),
    "token_selection": dataclasses.replace(CONFIG, keep_ratio=1.0),
}
"""Settings that run sparse and see every token."""

Given = list[Any]  # tensors, text and numbers


def generated(model: PreTrainedModel, ids: torch.Tensor | None = None, **options: Any) -> Given:
    """Greedy generation unless `options` say otherwise: sequences and logits."""
    ids = make_ids(LENGTH) if ids is None and "inputs_embeds" not in options else ids
    out = model.generate(ids, **{"do_sample": False, **NEW, **options})
    return [out.sequences, *out.logits]


def padded(side: str) -> dict[str, torch.Tensor]:
    ids = make_ids(LENGTH, batch=2)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 20) if side == "left" else slice(LENGTH - 20, LENGTH)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def whole_logits(model: PreTrainedModel) -> Given:
    return [model(make_ids(LENGTH)).logits]


def left_padding(model: PreTrainedModel) -> Given:
    given = padded("left")
    return generated(model, given["input_ids"], attention_mask=given["attention_mask"])


def right_padding(model: PreTrainedModel) -> Given:
    given = padded("right")
    return [model(**given).logits[given["attention_mask"].bool()]]


def seeded_samples(model: PreTrainedModel) -> Given:
    torch.manual_seed(0)
    return generated(model, do_sample=True, num_return_sequences=2)


def beams(model: PreTrainedModel) -> Given:
    return generated(model, num_beams=2, num_return_sequences=2)


def assisted(model: PreTrainedModel) -> Given:
    return generated(model, assistant_model=assistant())


def prompt_lookup(model: PreTrainedModel) -> Given:
    twice = make_ids(LENGTH // 2).repeat(1, 2)
    return generated(model, twice, prompt_lookup_num_tokens=4, max_new_tokens=6)


def embeddings(model: PreTrainedModel) -> Given:
    return generated(model, inputs_embeds=model.get_input_embeddings()(make_ids(LENGTH)))


def guidance(model: PreTrainedModel) -> Given:
    return generated(model, guidance_scale=1.5, negative_prompt_ids=make_ids(LENGTH - 9, seed=4))


def without_cache(model: PreTrainedModel) -> Given:
    return generated(model, use_cache=False)


def prefill_chunks(model: PreTrainedModel) -> Given:
    return generated(model, prefill_chunk_size=30)


def static_cache(model: PreTrainedModel) -> Given:
    return generated(model, cache_implementation="static")


def two_turns(model: PreTrainedModel) -> Given:
    ids, cache = make_ids(2 * LENGTH), DynamicCache(config=model.config)
    turns = (slice(0, LENGTH), slice(LENGTH, None))
    return [model(ids[:, turn], past_key_values=cache).logits for turn in turns]


def text_pipeline(model: PreTrainedModel) -> Given:
    task = pipeline("text-generation", model=model, tokenizer=make_tokenizer(), device="cpu")
    prompts = [" ".join(WORDS[:LENGTH]), " ".join(WORDS[60 : 60 + LENGTH // 2])]
    task.tokenizer.padding_side = "left"
    replies = task(prompts, max_new_tokens=3, do_sample=False, batch_size=2)
    return [reply["generated_text"] for (reply,) in replies]


def training(model: PreTrainedModel, *, use_reentrant: bool) -> Given:
    """Loss and gradients with gradient checkpointing."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    try:
        with torch.enable_grad():
            torch.manual_seed(0)
            loss = model(make_ids(LENGTH), labels=make_ids(LENGTH), use_cache=False).loss
            loss.backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
    finally:
        model.zero_grad()
        model.gradient_checkpointing_disable()
        model.eval()
    return [loss, *gradients]


def checkpointing(model: PreTrainedModel) -> Given:
    return training(model, use_reentrant=False)


def reentrant_checkpointing(model: PreTrainedModel) -> Given:
    return training(model, use_reentrant=True)


def eager(model: PreTrainedModel) -> Given:
    return [model(**padded("left")).logits[0], *generated(model)]


def deep_copy(model: PreTrainedModel) -> Given:
    return whole_logits(copy.deepcopy(model))


def pickled(model: PreTrainedModel) -> Given:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return whole_logits(torch.load(file, weights_only=False))


MODES: dict[str, Callable[[PreTrainedModel], Given]] = {
    "logits of a prompt": whole_logits,
    "greedy": generated,
    "sampling, several replies": seeded_samples,
    "beam search": beams,
    "assisted decoding": assisted,
    "prompt lookup": prompt_lookup,
    "classifier-free guidance": guidance,
    "`inputs_embeds`": embeddings,
    "`prefill_chunk_size`": prefill_chunks,
    "no cache": without_cache,
    "static cache": static_cache,
    "second turn": two_turns,
    "left padding": left_padding,
    "right padding": right_padding,
    "text-generation pipeline": text_pipeline,
    "gradient checkpointing": checkpointing,
    "gradient checkpointing, reentrant": reentrant_checkpointing,
    "eager attention": eager,
    "`copy.deepcopy`": deep_copy,
    "`torch.save`": pickled,
}
TRAINING = ("gradient checkpointing", "gradient checkpointing, reentrant")
COPIES = ("`copy.deepcopy`", "`torch.save`")


@cache
def family_model(family: str, variant: str = "") -> PreTrainedModel:
    """A family's model, made once: "eager", or "training", which leaves functions behind."""
    model = make_model(family)
    if variant == "eager":
        model.set_attn_implementation("eager")
    return model


def model_for(family: str, mode: str) -> PreTrainedModel:
    variant = "training" if mode in TRAINING else "eager" if mode == "eager attention" else ""
    return family_model(family, variant)


@cache
def assistant() -> PreTrainedModel:
    """Drafts for every family."""
    return make_model("Llama", seed=3)


@cache
def dense(family: str, mode: str) -> Given | Exception:
    """What a mode gives without `apply`; the error where transformers does not offer it."""
    model = model_for(family, mode)
    try:
        return MODES[mode](model)
    except Exception as error:
        return error


def measure(family: str) -> dict[str, str]:
    """What `apply` makes of each kind of layer, or of the model."""
    model, ids = family_model(family), make_ids(LENGTH)
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
    found: dict[str, set[str]] = {kind: set() for kind in kinds}
    try:
        with apply(model, SAMPLING) as report:
            model(ids)
    except ValueError as error:
        return {"refused": str(error)}
    for record in report:
        found[kinds[record.layer]] |= {reason or "sparse" for reason in record.reasons}
    return {kind: "; ".join(sorted(said)) or "no attention" for kind, said in found.items()}


def measure_all() -> dict[str, Any]:
    """The content of `RESULT`."""
    families = {family: measure(family) for family in FAMILIES}
    served = [family for family, kinds in families.items() if "refused" not in kinds]
    return {
        "transformers": transformers.__version__,
        "families": families,
        "not_offered": {
            mode: [family for family in served if isinstance(dense(family, mode), Exception)]
            for mode in MODES
        },
    }


def main() -> None:
    """Write the result file."""
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with torch.no_grad():
        RESULT.write_text(json.dumps(measure_all(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
