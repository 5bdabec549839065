"""The model arranged for decoding: fused and packed weights, and the tensor functions that every mode is made of.

Three functions are enough: run one segment on a block of lanes over its cache, the head behind one, the pool of several
heads. A segment is the layers up to the next head: a stage, or a part of one where it has exits. Each function reads
and writes the cache's buffers itself and has static shapes at decode time, so that ``torch.compile`` takes it as one
graph and a step costs a call per segment.

Shapes: ``B`` rows, ``W`` lanes of a block, ``S`` slots of the cache, ``D`` width, ``V`` vocab, ``N`` query heads,
``G`` key/value heads, ``h`` head dim. ``lanes`` ``[2, B]`` int64 says where the lanes of a block stand: the first slot
of every row and how many of its lanes are in use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .blocks_cognica_poe import (
    Rotary,
    attention_dtype,
    feed_forward,
    gate_values,
    place_heads,
    rmsnorm,
    rotary_factors,
    run_layer,
    smear,
    softcap,
    visible_slots,
)
from .graphs_cognica_poe import Graphs
from .linears_cognica_poe import LINEARS, kept
from .sampling_cognica_poe import combine
from .weights_cognica_poe import digest, identity, plain_weights, segment_of

ENGINES = "_decoding_engines"
"""Attribute of a model that holds its :class:`Engines`."""

SHAPES = 4
"""Sizes of batch and text whose compiled graphs an engine holds at once."""


def natural_width(model) -> int:
    """Lanes of a decode step that cost about as much as one lane.

    Accelerators read weights far slower than they multiply: 8, and so do processors with tile instructions for bf16.
    Others with bf16 products take 4 rows in 1.2 times the time of one; in fp32 every row costs as much as the first,
    and only 1 is free (docs/decoding.md).
    """
    if model.device.type != "cpu":
        return 8
    if model.dtype != torch.bfloat16:
        return 1
    return 8 if torch.cpu._is_amx_tile_supported() else 4


class DecodeLayer(nn.Module):
    """One layer with its three attention projections as a single product, over slots instead of a whole text."""

    def __init__(self, model, index: int, linear):
        super().__init__()
        config, block = model.config, model.transformer.h[index]
        attention, embedded = block.attn, model.config.has_value_embedding(index)
        # The shape is read once: every look at a configuration of transformers costs as much as a small operation.
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.eps, self.qk_scale = config.rms_norm_eps, config.qk_scale
        self.config, self.head_dim, self.kind = config, config.head_dim, config.layer_types[index]
        self.c_qkv = linear(torch.cat([m.weight for m in (attention.c_q, attention.c_k, attention.c_v)]))
        others = (attention.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        self.c_proj, self.c_fc, self.mlp_proj = (linear(m.weight) for m in others)
        self.resid_lambda, self.x0_lambda = kept(model.resid_lambdas[index]), kept(model.x0_lambdas[index])
        self.value_embedding = kept(model.value_embeds[str(index)].weight) if embedded else None
        self.gate = kept(attention.ve_gate.weight) if embedded else None

    def forward(self, x, x0, ids, rotary: Rotary, masks, rows, write, keys, values, span: int) -> torch.Tensor:
        """``x``, ``x0`` ``[B, W, D]`` to ``[B, W, D]``; ``keys`` and ``values`` ``[B, S, G, h]`` get the lanes' own."""

        def attention(n: torch.Tensor) -> torch.Tensor:
            q, k, v = self._project(n, ids, rotary, eps)
            keys[rows, write], values[rows, write] = k.to(keys.dtype), v.to(values.dtype)
            return self.c_proj(self._attend(q, keys[:, :span], values[:, :span], masks[self.kind]))

        eps, mlp = self.eps, functools.partial(feed_forward, c_fc=self.c_fc, c_proj=self.mlp_proj)
        return run_layer(x, x0, self.resid_lambda, self.x0_lambda, eps, attention, mlp)

    def _project(self, n: torch.Tensor, ids: torch.Tensor, rotary: Rotary, eps: float) -> tuple[torch.Tensor, ...]:
        """Queries ``[B, W, N, h]``, keys and values ``[B, W, G, h]`` of normed states ``[B, W, D]``."""
        (N, G), gate, value_embedding = self.heads, self.gate, self.value_embedding
        qk, v = self.c_qkv(n).view(*n.shape[:2], -1, self.head_dim).split((N + G, G), dim=2)
        if gate is not None and value_embedding is not None:
            opened = _small_product(n[..., : gate.shape[1]], gate)
            v = gate_values(v, opened, F.embedding(ids, value_embedding))
        q, k = place_heads(qk, rotary, eps, self.qk_scale).split((N, G), dim=2)
        return q, k, v

    def _attend(self, q, keys, values, mask) -> torch.Tensor:
        """Queries ``[B, W, N, h]`` over the slots; heads that share keys become further queries. ``[B, W, N*h]``."""
        (B, W, N, h), G = q.shape, keys.shape[2]
        queries = q.view(B, W, G, N // G, h).permute(0, 2, 3, 1, 4).reshape(B, G, -1, h).to(keys.dtype)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=h**-0.5)
        return out.to(q.dtype).view(B, G, N // G, W, h).permute(0, 3, 1, 2, 4).reshape(B, W, N * h)


class SegmentLayers(nn.Module):
    """The layers of one segment, from the states before them to the states behind them."""

    def __init__(self, model, segment: int, linear):
        super().__init__()
        self.config = model.config
        layers = self.config.segment_layers(segment)
        self.layers = nn.ModuleList([DecodeLayer(model, i, linear) for i in layers])
        self.kinds = set(self.config.layer_types)
        self.wte = kept(model.transformer.wte.weight)
        self.smear_gate, self.smear_lambda = kept(model.smear_gate.weight), kept(model.smear_lambda)

    def forward(self, width: int, span: int, lanes, ids, behind, states, keys, values, seen=None) -> None:
        """Run a block of ``width`` lanes and write what it computes into the cache.

        Args:
            width: lanes of the block.
            span: slots to attend to, from 0 on.
            lanes: where the lanes stand, see the module.
            ids: token ids ``[B, S]`` of the cache.
            behind: states ``[B, S, D]`` behind the segment before; None for the first, which begins with embeddings.
            states: states ``[B, S, D]`` behind this segment; the lanes' own are written.
            keys, values: one buffer ``[B, S, G, h]`` per layer of the segment; the lanes' own are written.
            seen: what :meth:`look` of any segment found for this block.
        """
        rows, slots, write, tokens, x0, rotary, masks = seen or self.look(width, span, lanes, ids)
        x = x0 if behind is None else behind[rows, slots]
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            x = layer(x, x0, tokens, rotary, masks, rows, write, k, v, span)
        states[rows, write] = x

    def look(self, width: int, span: int, lanes, ids) -> tuple:
        """What is the same for all segments of a block: rows, slots, where to write, ids, ``x0``, rotary, masks."""
        config, (slots, write) = self.config, find_lanes(lanes, width, ids.shape[1] - 1)
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        tokens, before = ids[rows, slots], ids[rows, (slots - 1).clamp(min=0)]
        x0 = self._embed(tokens, before, slots)
        rotary = rotary_factors(slots, config.head_dim, config.rope_theta, x0.dtype, heads_dim=2)
        return rows, slots, write, tokens, x0, rotary, self._masks(slots, span, x0.dtype)

    def _embed(self, ids, before, slots) -> torch.Tensor:
        eps = self.config.rms_norm_eps
        x, earlier = (rmsnorm(F.embedding(tokens, self.wte), eps) for tokens in (ids, before))
        gate = _small_product(x[..., : self.smear_gate.shape[1]], self.smear_gate)
        return smear(x, earlier * (slots > 0).unsqueeze(-1), gate, self.smear_lambda)

    def _masks(self, slots, span: int, dtype) -> dict[str, torch.Tensor]:
        """Additive masks ``[B, 1, N/G*W, span]`` in the dtype of attention: a query sees the slots up to its own."""
        config, key = self.config, torch.arange(span, device=slots.device)
        visible = visible_slots(slots[:, None, :, None], key, config.sliding_window)
        groups = config.num_attention_heads // config.num_key_value_heads
        zero = torch.zeros((), dtype=attention_dtype(config, dtype), device=slots.device)
        return {kind: torch.where(visible[kind], zero, float("-inf")).repeat(1, 1, groups, 1) for kind in self.kinds}


class Heads(nn.Module):
    """Heads behind some segments, each folded with the shared one, and their product."""

    def __init__(self, config, heads: Sequence[nn.Module]):
        super().__init__()
        self.config, self.heads = config, nn.ModuleList(heads)

    def forward(self, width: int, weights: Sequence[float] | None, alpha: float, lanes, *states):
        """Log-probabilities ``[B, W, V]`` of the product of experts at a block's lanes, see :func:`combine`.

        Args:
            width: lanes of the block.
            weights: one per head; None gives the capped logits of the one head instead.
            alpha: exponent of the number of heads.
            lanes: where the lanes stand, see the module.
            states: states ``[B, S, D]`` behind the segment of every head.
        """
        logits = []
        for head, behind in zip(self.heads, states, strict=True):
            slots, _ = find_lanes(lanes, width, behind.shape[1] - 1)
            x = behind[torch.arange(behind.shape[0], device=behind.device)[:, None], slots]
            z = head(rmsnorm(x, self.config.rms_norm_eps))
            logits.append(softcap(z, self.config.logit_softcap))
        return logits[0] if weights is None else combine(logits, alpha, weights, normalise=False)


class Engine:
    """Functions of one model in one form of its weights; segments are arranged when first asked for, and once.

    Args:
        model: the causal language model, in evaluation mode.
        form: key of ``LINEARS``.
        segments: how many segments to arrange at once, from the first on, with their heads; all when None.
        width: lanes of every decode step, see :class:`StageCache`; :func:`natural_width` when None.
        compiled: run decode steps through :class:`Graphs`, one graph per function and shape.
    """

    def __init__(
        self, model, form: str = "dense", segments: int | None = None, width: int | None = None, compiled: bool = False
    ):
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.width, self.linear = width or natural_width(model), functools.partial(LINEARS[form], compiled=compiled)
        self.segments: list[SegmentLayers] = []
        self.folded: list[nn.Module] = []
        self.heads: dict[tuple[int, ...], Heads] = {}
        # A call takes a graph per segment and per head at most, and one or two of pools.
        self.graphs = Graphs(self.device, SHAPES * (2 * len(self.config.poe_cuts) + 2)) if compiled else None
        self.seen_of: torch.Tensor | None = None
        self.seen: tuple | None = None
        self.reach(model, len(self.config.poe_cuts) if segments is None else segments)

    def reach(self, model, segments: int) -> None:
        """Arrange what is missing of the first ``segments`` segments and of their heads."""
        for segment in range(len(self.segments), segments):
            self.segments.append(SegmentLayers(model, segment, self.linear))
            self.folded.append(self.linear(model.segment_weight(segment)))

    @property
    def parts(self) -> list[nn.Module]:
        """All modules that hold weights."""
        return [part for module in (*self.segments, *self.folded) for part in module.modules()]

    def copied(self, weights: dict[str, torch.Tensor]) -> list[str]:
        """Names of the weights that this engine holds in a form of its own: it does not see them change.

        A processor's graph holds all its weights; otherwise a weight is referred to where a module reads it in place.
        """
        names = [name for name in weights if segment_of(name, self.config) < len(self.segments)]
        if self.graphs is not None and self.device.type == "cpu":
            return names
        in_place = [part for part in self.parts if getattr(part, "packed", None) is None]
        read = {buffer.data_ptr() for part in in_place for buffer in part.buffers(recurse=False)}
        return [name for name in names if weights[name].data_ptr() not in read]

    def run_segment(self, segment: int, width: int, span: int, lanes, ids, behind, states, keys, values) -> None:
        """Run a block of lanes through a segment, see :class:`SegmentLayers`; only decode steps are compiled."""
        tensors = (lanes, ids, behind, states, keys, values)
        if (width, span) != (self.width, ids.shape[1]):
            self.segments[segment](width, span, *tensors)
        elif self.graphs is None:
            if self.seen_of is not lanes:  # which are made anew when tokens have changed
                self.seen_of, self.seen = lanes, self.segments[0].look(width, span, lanes, ids)
            self.segments[segment](width, span, *tensors, self.seen)
        else:
            self.graphs.call(("segment", segment, *ids.shape), self.segments[segment], (width, span), *tensors)

    def run_heads(self, heads: tuple[int, ...], weights: tuple[float, ...] | None, alpha: float, lanes, *states):
        """Logits or pool ``[B, W, V]`` at a block's lanes in one pass, see :class:`Heads`."""
        if heads not in self.heads:
            self.heads[heads] = Heads(self.config, [self.folded[segment] for segment in heads])
        function, fixed = self.heads[heads], (self.width, weights, alpha)
        if self.graphs is None:
            return function(*fixed, lanes, *states)
        return self.graphs.call(("heads", heads, *fixed, *states[0].shape), function, fixed, lanes, *states)


class Engines:
    """The engines of one model, made when first asked for and again when its weights have changed.

    There is one per form of the weights, three at most, whatever modes are asked for: a prefix of the segments is the
    beginning of the same engine. They hang on the model object and are freed with it; its copies and pickles have none.
    """

    def __init__(self):
        self.width, self.compiled = None, False
        self._forget()

    def _forget(self) -> None:
        self.identity: list[tuple] = []
        self.made: dict[str, Engine] = {}
        self.measured: dict = {}
        self.digests: dict[str, torch.Tensor] = {}

    @classmethod
    def attached(cls, model) -> Engines:
        """The engines that hang on ``model``, whatever has become of its weights."""
        return vars(model).setdefault(ENGINES, cls())

    @classmethod
    def of(cls, model) -> Engines:
        """The engines of ``model``; empty ones when its weights are not those that they were made from.

        What an engine refers to needs no look, what it copied is compared bit by bit (:func:`digest`).

        Raises:
            ValueError: the weights cannot be taken, see :func:`plain_weights`.
        """
        engines, weights = cls.attached(model), plain_weights(model)
        now, before = identity(weights), engines.digests
        same = engines.identity == now
        if same and before:
            digests = torch.cat([digest(weights[name]) for name in before])
            same = torch.equal(digests, torch.cat(list(before.values())))
        if not same:
            engines._forget()
            engines.identity = now
        return engines

    def get(self, model, form: str = "dense", segments: int | None = None) -> Engine:
        """The engine of a form of the weights, with at least the first ``segments`` segments."""
        segments = len(model.config.poe_cuts) if segments is None else segments
        engine = self.made.get(form)
        if engine is None or len(engine.segments) < segments:
            if engine is None:
                engine = self.made[form] = Engine(model, form, segments, self.width, self.compiled)
            engine.reach(model, segments)
            weights = plain_weights(model)
            new = [name for name in engine.copied(weights) if name not in self.digests]
            self.digests |= {name: digest(weights[name]) for name in new}
        return engine

    def configure(self, width: int | None, compiled: bool) -> None:
        """Set the lanes of decode steps and whether they are compiled; drops engines made otherwise."""
        if (width, compiled) != (self.width, self.compiled):
            self.width, self.compiled = width, compiled
            self._forget()


def find_lanes(lanes: torch.Tensor, width: int, spare: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot of every lane ``[B, width]``, and where it writes: lanes that a row does not use write to slot ``spare``."""
    places = torch.arange(width, device=lanes.device)
    slots = (lanes[0, :, None] + places).clamp(max=spare)
    return slots, torch.where(places < lanes[1, :, None], slots, spare)


def _small_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` for few channels ``[..., C]`` and outputs ``[O, C]``, where a product's call is all overhead."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide).unsqueeze(-2) * weight.to(wide)).sum(dim=-1).to(x.dtype)
