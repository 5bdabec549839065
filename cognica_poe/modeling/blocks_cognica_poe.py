"""The layers of the trunk: rotary positions, attention with value embeddings, MLP, block.

Shapes: ``B`` batch, ``T`` time, ``D`` width, ``N`` query heads, ``G`` key/value heads, ``h`` head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_cognica_poe import CognicaPoEConfig

Rotary = tuple[torch.Tensor, torch.Tensor]


def rmsnorm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Parameter-free RMSNorm over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def rotary_tables(positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """cos and sin, each ``[B, 1, T, h/2]``, of integer positions ``[B, T]``; computed in fp32, never stored."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, None, :, None].float() * (theta ** (-channels / head_dim))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate the halves of ``[B, N, T, h]`` by minus theta (nanochat's convention, kept for its checkpoints)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


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
        q = self.c_q(n).view(B, T, -1, self.head_dim)
        k = self.c_k(n).view(B, T, -1, self.head_dim)
        v = self.c_v(n).view(B, T, -1, self.head_dim)
        if value_embedding is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(n[..., : self.config.ve_gate_channels]))
            v = v + gate.unsqueeze(-1) * value_embedding.view_as(v)
        eps, scale = self.config.rms_norm_eps, self.config.qk_scale
        q = rmsnorm(apply_rotary(q.transpose(1, 2), rotary), eps) * scale
        k = rmsnorm(apply_rotary(k.transpose(1, 2), rotary), eps) * scale
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        # A cache of rows of unequal length knows how to attend; others leave it to the configured implementation.
        attended = cache.attend(self, q, k, v, mask) if hasattr(cache, "attend") else self._attend(q, k, v, mask)
        return self.c_proj(attended.reshape(B, T, -1))

    def _attend(self, q, k, v, mask):
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dtype = q.dtype
        if self.config.attention_in_fp32 and not self.training and implementation in ("sdpa", "eager"):
            # Low-precision kernels round prefill and decode differently; in fp32 the two agree (card, "Numerical").
            q, k, v = (t if t.dtype == torch.float64 else t.float() for t in (q, k, v))
            mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        elif implementation == "flex_attention":  # knows no autocast, under which the norms of q and k return fp32
            q, k = q.to(v.dtype), k.to(v.dtype)
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
        return self.c_proj(F.relu(self.c_fc(n)).square())


class Block(nn.Module):
    """One transformer layer, the mixing with the embedding stream ``x0`` included."""

    def __init__(self, config: CognicaPoEConfig, layer_idx: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x, x0, resid_lambda, x0_lambda, rotary, mask, value_embedding=None, cache=None):
        """``x``, ``x0`` ``[B, T, D]``, the lambdas scalars; returns ``[B, T, D]``."""
        x = resid_lambda * x + x0_lambda * x0
        x = x + self.attn(rmsnorm(x, self.eps), rotary, mask, value_embedding, cache)
        return x + self.mlp(rmsnorm(x, self.eps))
