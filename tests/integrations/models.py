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

from token_sparse_attention import KVSamplingConfig, TokenSelectionConfig, reference

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
LAYERS = 3
WORDS = [f"word{number}" for number in range(190)]
SHAPE = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 199,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HYBRID = {
    "head_dim": 16,
    "sliding_window": 40,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Gemma3Text": HYBRID,
    "Phi3": {},
    "GptOss": HYBRID | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Gemma2": HYBRID,
    "Granite": {},
    "Mixtral": {"num_local_experts": 2},
    "Olmo2": {},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}


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


def oracle_attention(settings, module, query, key, value, attention_mask, scaling=None, **_):
    """Each row cut out by its mask and given to the reference; decode steps stay dense.

    `settings` are the config, and each row's queries so far by module.
    """
    config, earlier = settings
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


@contextmanager
def oracle(model, config=CONFIG):
    """The model with every layer's attention replaced by the oracle."""
    AttentionInterface.register("oracle", partial(oracle_attention, (config, {})))
    AttentionMaskInterface.register("oracle", sdpa_mask)
    model.set_attn_implementation("oracle")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
