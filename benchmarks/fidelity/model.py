"""A Llama or Qwen2 model in plain PyTorch, whose prefill attends as a variant says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.fidelity.draw import draw, pairs
from benchmarks.fidelity.kernel import attend
from benchmarks.fidelity.variants import Variant
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

EVERY = 1 << 30
"""A window that holds every key."""


class Model:
    """A causal language model with one cache, for one sequence at a time.

    Args:
        folder: config.json and model.safetensors, with tied embeddings.
        device: where to run.
        dtype: of the weights and the cache.
        capacity: tokens that the cache holds.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, capacity: int) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.load(config, load_file(folder / "model.safetensors"), device, dtype, capacity)

    def load(
        self,
        config: dict[str, Any],
        weights: dict[str, Tensor],
        device: str,
        dtype: torch.dtype,
        capacity: int,
    ) -> None:
        """Take the weights of a checkpoint."""
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads
        self.layers, self.eps = config["num_hidden_layers"], config["rms_norm_eps"]
        self.weights = {name: w.to(device, dtype) for name, w in weights.items()}
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        powers = torch.arange(0, self.size, 2, device=device).double() / self.size
        angles = torch.arange(capacity, device=device)[:, None] * theta**-powers
        self.cos = angles.cos().repeat(1, 2).float()
        self.sin = angles.sin().repeat(1, 2).float()
        shape = (self.layers, self.kv_heads, capacity, self.size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.device = torch.device(device)

    def run(
        self, tokens: Tensor, first: int, variant: Variant | None = None, dense_last: int = 0
    ) -> tuple[Tensor, list[tuple[float, float]]]:
        """Return the final hidden states of tokens, and the cost of each sparse layer.

        Args:
            tokens: ``[n]`` ids.
            first: position of the first; the cache before it is read.
            variant: how to attend, None for dense; with a variant, `first` is 0.
            dense_last: how many of the last queries attend to every key all the same.
        """
        count = len(tokens)
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        costs = []
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            normed = self._norm(hidden, f"{name}input_layernorm")
            query = self._project(normed, f"{name}self_attn.q_proj", self.heads)
            key = self._project(normed, f"{name}self_attn.k_proj", self.kv_heads)
            value = self._project(normed, f"{name}self_attn.v_proj", self.kv_heads)
            query, key = self._turn(query, first), self._turn(key, first)
            self.keys[layer, :, first : first + count] = key
            self.values[layer, :, first : first + count] = value
            sparse = variant is not None and (
                not variant.layers or variant.layers[0] <= layer < variant.layers[1]
            )
            if sparse and variant is not None:
                out, cost = self._sparse(variant, layer, query, key, value, dense_last)
                costs.append(cost)
            elif first:
                out = attend(
                    query, self.keys[layer], self.values[layer], first, first + count, EVERY
                )
            else:
                out = F.scaled_dot_product_attention(
                    query[None], key[None], value[None], is_causal=True, enable_gqa=True
                )[0]
            out = out.transpose(0, 1).reshape(count, -1)
            hidden = hidden + self._linear(out, f"{name}self_attn.o_proj")
            normed = self._norm(hidden, f"{name}post_attention_layernorm")
            gate = F.silu(self._linear(normed, f"{name}mlp.gate_proj"))
            gate *= self._linear(normed, f"{name}mlp.up_proj")
            hidden = hidden + self._linear(gate, f"{name}mlp.down_proj")
        return self._norm(hidden, "model.norm"), costs

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Return the float32 log-probabilities of the next token."""
        logits = hidden @ self.weights["model.embed_tokens.weight"].T
        return logits.float().log_softmax(-1)

    def _sparse(
        self,
        variant: Variant,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dense_last: int,
    ) -> tuple[Tensor, tuple[float, float]]:
        length = query.shape[1]
        key, value = key.contiguous(), value.contiguous()
        entries = draw(variant, query, key, value)
        block = variant.block or length
        out = attend(query, key, value, 0, length, variant.window, block, entries)
        if variant.delta:
            step = variant.delta
            lead = torch.arange(0, length, step, device=query.device)
            right = _rows(query, key, value, lead)
            change = (right - out[:, lead].float()).repeat_interleave(step, 1)[:, :length]
            out = (out.float() + change).to(out.dtype)
        if dense_last:
            start = length - dense_last
            cache = self.keys[layer], self.values[layer]
            out[:, start:] = attend(query[:, start:], *cache, start, length, EVERY)
        return out, pairs(variant, entries, length)

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self.weights[f"{name}.weight"], self.eps)

    def _linear(self, hidden: Tensor, name: str) -> Tensor:
        return F.linear(hidden, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _project(self, hidden: Tensor, name: str, heads: int) -> Tensor:
        return self._linear(hidden, name).view(len(hidden), heads, self.size).transpose(0, 1)

    def _turn(self, x: Tensor, first: int) -> Tensor:
        at = slice(first, first + x.shape[1])
        wide = x.float()
        low, high = wide.chunk(2, -1)
        half = torch.cat((-high, low), -1)
        turned: Tensor = wide * self.cos[at] + half * self.sin[at]
        return turned.to(x.dtype)


def _rows(query: Tensor, key: Tensor, value: Tensor, at: Tensor) -> Tensor:
    """Return dense attention of the queries at some positions, in float32."""
    heads, kv_heads = query.shape[0], key.shape[0]
    q = query[:, at].float().reshape(kv_heads, -1, query.shape[-1])
    logit = (q @ key.float().mT).view(heads, len(at), -1) * query.shape[-1] ** -0.5
    hidden = torch.arange(key.shape[1], device=at.device) > at[:, None]
    share = logit.masked_fill_(hidden, float("-inf")).softmax(-1).to(value.dtype)
    out: Tensor = share.view(kv_heads, -1, share.shape[-1]) @ value
    return out.view(heads, len(at), -1).float()
