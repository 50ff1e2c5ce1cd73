"""Decoder-only families by what their configs change about the tests' tiny shape."""

from __future__ import annotations

from typing import Any

SHAPE = {
    "num_hidden_layers": 3,
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
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
GROUPS_OF_3 = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}
GROUPS_OF_7 = {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}

# By the name before "Config" in transformers; every family there that is in wide use.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": GROUPS_OF_7,
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None, **GROUPS_OF_3},
    "Gemma3Text": HYBRID,
    "Phi3": {},
    "GptOss": HYBRID | EXPERTS,
    "Gemma2": HYBRID,
    "Granite": {},
    "Mixtral": {"num_local_experts": 2},
    "Olmo2": {},
    "DeepseekV3": LATENT,
    "Qwen3Moe": {"head_dim": 16, "num_experts": 2, "moe_intermediate_size": 32}
    | {"num_experts_per_tok": 1},
    "Phi": {},
    "Gemma": {"head_dim": 16},
    "Gemma3nText": HYBRID
    | {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8}
    | {"vocab_size_per_layer_input": 199, "laurel_rank": 8, "altup_num_inputs": 2}
    | {"activation_sparsity_pattern": [0.5, 0.0, 0.0]},
    "Olmo": {},
    "Olmo3": HYBRID,
    "StableLm": {},
    "Cohere": {},
    "Cohere2": HYBRID,
    "GPTNeoX": {},
    "Starcoder2": {"sliding_window": None},
    "Glm4": {"head_dim": 16},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Helium": {"head_dim": 16, "num_key_value_heads": 4},
    "Nemotron": GROUPS_OF_3,
    "DiffLlama": {"attention_dropout": 0.0},
    "MiniMaxM2": EXPERTS | {"head_dim": 16},
    "Llama4Text": EXPERTS
    | {"head_dim": 16, "intermediate_size_mlp": 96, "attention_chunk_size": 40}
    | {"layer_types": ["chunked_attention", "full_attention", "full_attention"]},
    "Qwen3Next": LINEAR
    | {"head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    | {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3_5Text": LINEAR | {"head_dim": 16},
    "OlmoHybrid": LINEAR | {"linear_num_value_heads": 2},
    "Lfm2": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "Bamba": MAMBA | {"attn_layer_indices": [1]},
    "FalconH1": MAMBA | {"mamba_d_ssm": 128},
    "GPT2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "GPTJ": {"rotary_dim": 8},
    "Falcon": {},
    "Bloom": {},
    "Mpt": {},
}
