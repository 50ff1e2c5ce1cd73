"""Tiny randomly initialised models of real architectures, and an attention oracle for them."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import sdpa_mask

from integrations.families import FAMILIES, HYBRID, SHAPE
from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig, reference
from token_sparse_attention.integrations.implementation import dense_function

CONFIG = TokenSelectionConfig(drop_mass=0.3, observation_window=16, pool_size=5, min_tokens=32)
SAMPLING = KVSamplingConfig(
    block_size=16,
    num_probes=8,
    sliding_window=16,
    sink_size=2,
    num_samples=24,
    dense_queries=6,
    crossover="off",
)
LAYERS = SHAPE["num_hidden_layers"]
WORDS = [f"word{number}" for number in range(190)]


def make_model(family: str = "Llama", seed: int = 0, **changes):
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**(SHAPE | FAMILIES.get(family, {}) | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def sharp(family="Llama"):
    """A model whose heads prefer different tokens, so that samples differ."""
    model = make_model(family)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "q_norm.weight")):
            weight.data.mul_(20)
    return model


def make_tokenizer(*, begin: bool = False):
    """A tokenizer of whole words for these models; `begin` puts <s> before each text."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def make_image_model(seed: int = 0):
    """A model of text and images, whose token 198 stands for an image."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=SHAPE | HYBRID,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=198,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def make_ids(length: int = 200, batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 199, (batch, length), generator=generator)


def oracle_attention(settings, module, query, key, value, attention_mask, scaling=None, **rest):
    """Each row cut out by its mask and given to the reference; decode steps stay dense.

    `settings` are the config, each row's queries so far by module, and the layers that are not
    the model's own attention; None for all.
    """
    config, earlier, layers = settings
    if layers is not None and module.layer_idx not in layers:
        return own_attention(module, query, key, value, attention_mask, scaling=scaling, **rest)
    batch, heads, query_len, head_dim = query.shape
    rows = torch.zeros(batch, query_len, heads, head_dim, dtype=query.dtype)
    for row in range(batch):
        if attention_mask is None:
            real = torch.arange(query_len if query_len > 1 else key.shape[2])
            first_query = len(real) - query_len
            queries = torch.arange(query_len)
        else:
            visible = attention_mask[row, 0]
            real = visible.any(0).nonzero().flatten()
            slot_of_query = [v.nonzero().max() if v.any() else -1 for v in visible]
            # A padded query repeats the slot before it, or sees nothing at all.
            queries = torch.tensor(
                [i for i, s in enumerate(slot_of_query) if s >= 0 and s not in slot_of_query[:i]]
            )
            first_query = len(real) - len(queries)
        assert first_query >= 0
        q = query[row, :, queries]
        k, v = key[row, :, real], value[row, :, real]
        if query_len == 1:
            allowed = torch.ones(1, 1, len(real), dtype=torch.bool)
            out = reference.masked_attention(q, k, v, allowed, scaling)
        else:
            past = earlier.get((module, row)) if first_query else None
            out, _ = reference.token_sparse_attention(q, k, v, config, scaling, past_query=past)
            earlier[module, row] = q if past is None else torch.cat((past, q), 1)
        rows[row, queries] = out.transpose(0, 1)
    return rows, None


def own_attention(module, query, key, value, attention_mask, **rest):
    """What the layer's own eager function gives under a mask of True and False."""
    if attention_mask is None:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(
            key.shape[2] - query.shape[2]
        )[None, None]
    least = torch.finfo(query.dtype).min
    additive = torch.zeros(attention_mask.shape).masked_fill(~attention_mask, least)
    return dense_function("eager", module)(module, query, key, value, additive, **rest)


@contextmanager
def oracle(model, config=CONFIG, layers=None):
    """The model with every layer's attention replaced by the oracle, or that of some layers."""
    AttentionInterface.register("oracle", partial(oracle_attention, (config, {}, layers)))
    AttentionMaskInterface.register("oracle", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
