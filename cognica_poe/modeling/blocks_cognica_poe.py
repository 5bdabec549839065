"""The layer of the trunk, written once: functions that a forward pass, training and decoding all call, and modules.

The modules run whole texts and hold heads before time, ``[B, N, T, h]``. Decoding holds them behind it, with products,
a cache and attention of its own; what is computed in between is here.

Shapes: ``B`` batch, ``T`` time, ``D`` width, ``N`` query heads, ``G`` key/value heads, ``h`` head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_overlay
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_cognica_poe import CognicaPoEConfig

Function = Callable[[Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]


def rmsnorm(x: Tensor, eps: float) -> Tensor:
    """Parameter-free RMSNorm over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def smear(x: Tensor, before: Tensor, gate: Tensor, strength: Tensor) -> Tensor:
    """Add to normed embeddings ``x`` ``[B, T, D]`` some of those of the tokens ``before``, 0 where there is none.

    ``gate`` ``[B, T, 1]`` says how much, up to the learnt factor ``strength`` ``[1]``.
    """
    return x + strength * torch.sigmoid(gate) * before


def rotary_factors(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, heads_dim: int = 1) -> Rotary:
    """cos and sin of integer positions ``[B, T]``; computed in fp32, never stored.

    Each is ``[B, 1, T, h/2]``, or ``[B, T, 1, h/2]`` with ``heads_dim=2`` for heads that stand behind time.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.unsqueeze(heads_dim).unsqueeze(-1).float() * (theta ** (-channels / head_dim))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the halves of ``[..., h]`` by minus theta (nanochat's convention, kept for its checkpoints)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def place_heads(x: Tensor, rotary: Rotary, eps: float, scale: float) -> Tensor:
    """Queries or keys ``[..., h]`` rotated to their positions, normed and scaled."""
    return rmsnorm(apply_rotary(x, rotary), eps) * scale


def gate_values(v: Tensor, gate: Tensor, value_embedding: Tensor) -> Tensor:
    """Values ``[B, T, G, h]`` plus the tokens' value embeddings ``[B, T, G*h]``, by a ``gate`` ``[B, T, G]``."""
    return v + (3 * torch.sigmoid(gate)).unsqueeze(-1) * value_embedding.view_as(v)


def visible_slots(query: Tensor, key: Tensor, window: int) -> dict[str, Tensor]:
    """Who sees whom, bool by layer type, from positions that broadcast; the functions behind transformers' masks."""
    see = Callable[[int, int, Tensor, Tensor], Tensor]  # they are declared for single positions
    full = cast(see, causal_mask_function)(0, 0, query, key)
    near = cast(see, sliding_window_overlay(window))(0, 0, query, key)
    return {"full_attention": full, "sliding_attention": full & near}


def attention_dtype(config: CognicaPoEConfig, dtype: torch.dtype) -> torch.dtype:
    """Dtype of attention outside training.

    Low-precision kernels round prefill and decode differently; in fp32 the two agree (model card, "Numerical").
    """
    return torch.promote_types(dtype, torch.float32) if config.attention_in_fp32 else dtype


def feed_forward(n: Tensor, c_fc: Function, c_proj: Function) -> Tensor:
    """Two products around a squared ReLU."""
    return c_proj(F.relu(c_fc(n)).square())


def run_layer(
    x: Tensor, x0: Tensor, resid_lambda: Tensor, x0_lambda: Tensor, eps: float, attention: Function, mlp: Function
) -> Tensor:
    """One layer: the residual stream ``x`` mixed with the embedding stream ``x0``, then attention, then the MLP.

    Both streams are ``[B, T, D]``, the lambdas scalars; ``attention`` and ``mlp`` take normed states to what they add.
    """
    x = resid_lambda * x + x0_lambda * x0
    x = x + attention(rmsnorm(x, eps))
    return x + mlp(rmsnorm(x, eps))


def softcap(z: Tensor, cap: float) -> Tensor:
    """``cap * tanh(z / cap)`` of logits, in fp32 (fp64 stays)."""
    return cap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / cap)


def eager_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Plain attention, the slow reference beside the fused kernels; ``[B, N, T, h]`` in, ``[B, T, N, h]`` out."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, QK norm and gated value embeddings."""

    is_causal = True

    def __init__(self, config: CognicaPoEConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.c_q = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.c_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=False)
        if config.has_value_embedding(layer_idx):
            self.ve_gate = nn.Linear(config.ve_gate_channels, config.num_key_value_heads, bias=False)

    def forward(self, n, rotary, mask, value_embedding=None, cache=None):
        """``n`` ``[B, T, D]`` normed input, ``value_embedding`` ``[B, T, G*h]`` or None; returns ``[B, T, D]``."""
        B, T, _ = n.shape
        q, k, v = (project(n).view(B, T, -1, self.head_dim) for project in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            v = gate_values(v, self.ve_gate(n[..., : self.config.ve_gate_channels]), value_embedding)
        eps, scale = self.config.rms_norm_eps, self.config.qk_scale
        q, k = (place_heads(heads.transpose(1, 2), rotary, eps, scale) for heads in (q, k))
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.c_proj(self._attend(q, k, v, mask).reshape(B, T, -1))

    def _attend(self, q, k, v, mask):
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dtype = q.dtype
        if self.config.attention_in_fp32 and not self.training and implementation in ("sdpa", "eager"):
            q, k, v = (t.to(attention_dtype(self.config, t.dtype)) for t in (q, k, v))
            mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        elif implementation == "flex_attention":  # knows no autocast, under which norms and value embeddings are fp32
            device = q.device.type
            products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else v.dtype
            q, k, v = (t.to(products) for t in (q, k, v))
        out, _ = attend(
            self, q, k, v, mask, dropout=0.0, scaling=self.head_dim**-0.5, sliding_window=self.sliding_window
        )
        return out.to(dtype)


class MLP(nn.Module):
    """Two matrices around a squared ReLU."""

    def __init__(self, config: CognicaPoEConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, n):
        return feed_forward(n, self.c_fc, self.c_proj)


class Block(nn.Module):
    """One transformer layer, the mixing with the embedding stream ``x0`` included."""

    def __init__(self, config: CognicaPoEConfig, layer_idx: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x, x0, resid_lambda, x0_lambda, rotary, mask, value_embedding=None, cache=None):
        """``x``, ``x0`` ``[B, T, D]``, the lambdas scalars; returns ``[B, T, D]``."""
        attention = functools.partial(self.attn, rotary=rotary, mask=mask, value_embedding=value_embedding, cache=cache)
        return run_layer(x, x0, resid_lambda, x0_lambda, self.eps, attention, self.mlp)


class Trunk(nn.Module):
    """Token embeddings and layers, under the names of nanochat's checkpoints."""

    def __init__(self, config: CognicaPoEConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])
