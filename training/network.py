"""The models and their training forward pass.

The parameters live in a stock ``LlamaForCausalLM`` or ``Qwen3ForCausalLM``. The forward pass
here computes the same function on flat ``[tokens, hidden]`` tensors, so that everything but
attention is compiled once for all row lengths, and takes explicit positions without reading
document borders into them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .tokenizer import END_ID, PAD_ID, VOCABULARY

_EPSILON = 1e-6
THETA = 2e6
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


_SHAPES: dict[str, tuple[type[PretrainedConfig], int, int, int]] = {
    "llama": (LlamaConfig, 256, 14, 576),
    "qwen3": (Qwen3Config, 320, 18, 864),
}
"""Configuration class, hidden size, layers and MLP size."""
ARCHITECTURES = tuple(_SHAPES)


def make_config(architecture: str = "llama", layers: int | None = None) -> PretrainedConfig:
    """A configuration, deep and narrow, four query heads per KV head.

    ``"llama"`` is the bundled model's; ``"qwen3"`` is larger and normalises queries and keys.
    """
    kind, hidden, usual_layers, mlp = _SHAPES[architecture]
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers or usual_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=_EPSILON,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def make_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A freshly initialised model in float32."""
    torch.manual_seed(seed)
    kind = Qwen3ForCausalLM if isinstance(config, Qwen3Config) else LlamaForCausalLM
    model = kind(config)
    shrink = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            elif "embed" in name:
                parameter.normal_(0, 0.02)
            else:
                last = "o_proj" in name or "down_proj" in name
                scale = 0.6 * parameter.shape[1] ** -0.5
                parameter.normal_(0, scale * (shrink if last else 1.0))
    return model


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPSILON)
    return (scaled * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def _before(
    x: Tensor,
    norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_norms: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, projections and RoPE; heads are the middle dimension of the results."""
    weight = torch.cat([query, key, value]).to(x.dtype)
    q, k, v = F.linear(_norm(x, norm), weight).split(
        [query.shape[0], key.shape[0], value.shape[0]], dim=-1
    )
    q, k = (part.unflatten(-1, (-1, 64)) for part in (q, k))
    if head_norms is not None:
        q, k = _norm(q, head_norms[0]), _norm(k, head_norms[1])
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    return q, k, v.unflatten(-1, (-1, 64)).contiguous()


def _after(
    x: Tensor, mixed: Tensor, out: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Output projection, residual, norm and MLP."""
    x = x + F.linear(mixed, out.to(x.dtype))
    inner = F.linear(_norm(x, norm), torch.cat([gate, up]).to(x.dtype))
    first, second = inner.chunk(2, dim=-1)
    return x + F.linear(F.silu(first) * second, down.to(x.dtype))


def _score(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token, and whether the most likely token is the right one."""
    logits = F.linear(_norm(x, norm), embedding.to(x.dtype)).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses, logits.detach().argmax(-1) == targets


class Forward:
    """The training forward pass over the parameters of ``model``."""

    def __init__(self, model: Any, dtype: torch.dtype, compiled: bool) -> None:
        self.model, self.dtype = model, dtype
        self._before, self._after, self._score = _before, _after, _score
        if compiled:
            compiler = torch.compile(fullgraph=True, dynamic=False)
            self._before, self._after = compiler(_before), compiler(_after)
            self._score = compiler(_score)
        device = model.model.embed_tokens.weight.device
        steps = torch.arange(0, 64, 2, device=device, dtype=torch.float32) / 64
        self._frequencies = 1.0 / (THETA**steps)

    def __call__(
        self, tokens: Tensor, positions: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and correctness of each token, flat; the inputs are [rows, length]."""
        rows, length = tokens.shape
        angles = positions.reshape(-1, 1, 1).float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        core = self.model.model
        x = F.embedding(tokens.reshape(-1), core.embed_tokens.weight).to(self.dtype)
        for layer in core.layers:
            a, m = layer.self_attn, layer.mlp
            q, k, v = self._before(
                x,
                layer.input_layernorm.weight,
                a.q_proj.weight,
                a.k_proj.weight,
                a.v_proj.weight,
                (a.q_norm.weight, a.k_norm.weight) if hasattr(a, "q_norm") else None,
                cos,
                sin,
            )
            q, k, v = (part.unflatten(0, (rows, length)).transpose(1, 2) for part in (q, k, v))
            with sdpa_kernel(_BACKENDS, set_priority=True):
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self._after(
                x,
                mixed.transpose(1, 2).reshape(rows * length, -1),
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                m.gate_proj.weight,
                m.up_proj.weight,
                m.down_proj.weight,
            )
        embedding = core.embed_tokens.weight
        losses, right = self._score(x, core.norm.weight, embedding, targets.reshape(-1))
        return losses, right
