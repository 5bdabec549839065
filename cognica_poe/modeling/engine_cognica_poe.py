"""The model arranged for decoding: fused and packed weights, and the tensor functions that every mode is made of.

Three functions are enough: run one stage on a block of lanes over its cache, one stage's head, the pool of several
heads. Each reads and writes the cache's buffers itself and has static shapes at decode time, so that ``torch.compile``
takes it as one graph and a step costs a call per stage.

Shapes: ``B`` rows, ``W`` lanes of a block, ``S`` slots of the cache, ``D`` width, ``V`` vocab, ``N`` query heads,
``G`` key/value heads, ``h`` head dim. A ``table`` ``[2, B]`` int64 says where the lanes of a block stand: the first
slot of every row and how many of its lanes are in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .blocks_cognica_poe import rmsnorm
from .graphs_cognica_poe import Graphs
from .linears_cognica_poe import LINEARS
from .weights_cognica_poe import digest, identity, plain_weights, stage_of

ENGINES = "_decoding_engines"
"""Attribute of a model that holds its :class:`Engines`."""


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
    """One block with its three attention projections as a single product."""

    def __init__(self, model, index: int, linear):
        super().__init__()
        config, block = model.config, model.transformer.h[index]
        attention = block.attn
        self.config, self.sliding = config, config.layer_types[index] == "sliding_attention"
        self.c_qkv = linear(torch.cat([m.weight for m in (attention.c_q, attention.c_k, attention.c_v)]))
        self.c_proj, self.c_fc, self.mlp_proj = (
            linear(m.weight.detach()) for m in (attention.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        )
        has_table = config.has_value_embedding(index)
        table = model.value_embeds[str(index)].weight if has_table else None
        gate = attention.ve_gate.weight if has_table else None
        keep_tensors(self, resid_lambda=model.resid_lambdas[index], x0_lambda=model.x0_lambdas[index])
        keep_tensors(self, table=table, gate=gate)

    def forward(self, x, x0, ids, rotary, masks, rows, write, keys, values, span: int):
        """``x``, ``x0`` ``[B, W, D]`` to ``[B, W, D]``; ``keys`` and ``values`` ``[B, S, G, h]`` get the lanes' own."""
        config = self.config
        eps, (B, W, _) = config.rms_norm_eps, x.shape
        x = self.resid_lambda * x + self.x0_lambda * x0
        n = rmsnorm(x, eps)
        N, G = config.num_attention_heads, config.num_key_value_heads
        qk, v = self.c_qkv(n).view(B, W, -1, config.head_dim).split((N + G, G), dim=2)
        if self.table is not None:
            gate = 3 * torch.sigmoid(_small_product(n[..., : config.ve_gate_channels], self.gate))
            v = v + gate.unsqueeze(-1) * F.embedding(ids, self.table).view_as(v)
        q, k = (rmsnorm(_rotate(qk, rotary), eps) * config.qk_scale).split((N, G), dim=2)
        keys[rows, write], values[rows, write] = k.to(keys.dtype), v.to(values.dtype)
        mask = masks["sliding" if self.sliding else "full"]
        attended = self._attend(q, keys[:, :span], values[:, :span], mask)
        x = x + self.c_proj(attended)
        return x + self.mlp_proj(F.relu(self.c_fc(rmsnorm(x, eps))).square())

    def _attend(self, q, keys, values, mask) -> torch.Tensor:
        """Queries ``[B, W, N, h]`` over the slots; heads that share keys become further queries. ``[B, W, N*h]``."""
        (B, W, N, h), G = q.shape, keys.shape[2]
        queries = q.view(B, W, G, N // G, h).permute(0, 2, 3, 1, 4).reshape(B, G, -1, h).to(keys.dtype)
        k, v = keys.transpose(1, 2), values.transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=h**-0.5)
        return out.to(q.dtype).view(B, G, N // G, W, h).permute(0, 3, 1, 2, 4).reshape(B, W, N * h)


class StageLayers(nn.Module):
    """The layers of one stage, from the states before them to the states behind them."""

    def __init__(self, model, stage: int, linear):
        super().__init__()
        self.config = model.config
        self.layers = nn.ModuleList([DecodeLayer(model, i, linear) for i in self.config.stage_layers(stage)])
        keep_tensors(self, wte=model.transformer.wte.weight)
        keep_tensors(self, smear_gate=model.smear_gate.weight, smear_lambda=model.smear_lambda)

    def forward(self, width: int, span: int, table, ids, behind, states, keys, values) -> None:
        """Run a block of ``width`` lanes and write what it computes into the cache.

        Args:
            width: lanes of the block.
            span: slots to attend to, from 0 on.
            table: where the lanes stand, see the module.
            ids: token ids ``[B, S]`` of the cache.
            behind: states ``[B, S, D]`` behind the stage before; None for stage 0, which starts from the embeddings.
            states: states ``[B, S, D]`` behind this stage; the lanes' own are written.
            keys, values: one buffer ``[B, S, G, h]`` per layer of the stage; the lanes' own are written.
        """
        slots, write = find_lanes(table, width, ids.shape[1] - 1)
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        tokens, before = ids[rows, slots], ids[rows, (slots - 1).clamp(min=0)]
        x0 = self._embed(tokens, before, slots)
        x = x0 if behind is None else behind[rows, slots]
        rotary, masks = self._rotary(slots, x.dtype), self._masks(slots, span, x.dtype)
        for layer, k, v in zip(self.layers, keys, values, strict=True):
            x = layer(x, x0, tokens, rotary, masks, rows, write, k, v, span)
        states[rows, write] = x

    def _embed(self, ids, before, slots) -> torch.Tensor:
        eps = self.config.rms_norm_eps
        x, earlier = (rmsnorm(F.embedding(tokens, self.wte), eps) for tokens in (ids, before))
        gate = self.smear_lambda * torch.sigmoid(_small_product(x[..., : self.config.smear_channels], self.smear_gate))
        return x + gate * earlier * (slots > 0).unsqueeze(-1)

    def _rotary(self, slots, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        channels = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=slots.device)
        angles = slots[..., None, None].float() * (self.config.rope_theta ** (-channels / self.config.head_dim))
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _masks(self, slots, span: int, dtype) -> dict[str, torch.Tensor]:
        """Additive masks ``[B, 1, N/G*W, span]`` in the dtype of attention: a query sees the slots up to its own."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        compute = attention_dtype(self.config, dtype)
        key, query = torch.arange(span, device=slots.device), slots[:, None, :, None]
        visible = {"full": key <= query}
        visible["sliding"] = visible["full"] & (key > query - self.config.sliding_window)
        kinds = {"sliding" if layer.sliding else "full" for layer in self.layers}
        zero = torch.zeros((), dtype=compute, device=slots.device)
        return {kind: torch.where(visible[kind], zero, float("-inf")).repeat(1, 1, groups, 1) for kind in kinds}


class Heads(nn.Module):
    """The heads of the first stages, each folded with the shared one, and their product."""

    def __init__(self, model, count: int, linear):
        super().__init__()
        self.config = model.config
        self.heads = nn.ModuleList([linear(_folded_head(model, stage)) for stage in range(count)])

    def forward(self, width: int, stages: Sequence[int], weights: Sequence[float] | None, alpha: float, table, *states):
        """Log-probabilities ``[B, W, V]`` of the product of experts at a block's lanes, see :func:`combine`.

        A normaliser of one expert is the same for the whole vocabulary, so that only the last one matters.

        Args:
            width: lanes of the block.
            stages: whose heads.
            weights: one per stage; None gives the capped logits of the one stage instead.
            alpha: exponent of the number of stages.
            table: where the lanes stand, see the module.
            states: states ``[B, S, D]`` behind every stage.
        """
        logits = [self._logits(stage, width, table, x) for stage, x in zip(stages, states, strict=True)]
        if weights is None:
            return logits[0]
        pooled = sum(weight * z for weight, z in zip(weights, logits, strict=True))
        return F.log_softmax(len(stages) ** alpha * pooled, dim=-1)

    def _logits(self, stage: int, width: int, table, states: torch.Tensor) -> torch.Tensor:
        slots, _ = find_lanes(table, width, states.shape[1] - 1)
        x = states[torch.arange(states.shape[0], device=states.device)[:, None], slots]
        z = self.heads[stage](rmsnorm(x, self.config.rms_norm_eps))
        cap = self.config.logit_softcap
        return cap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / cap)


class Engine:
    """Stage functions of one model in one form of its weights.

    Args:
        model: the causal language model, in evaluation mode.
        form: key of ``LINEARS``.
        stages: how many stages to arrange, from the first on; all when None.
        width: lanes of every decode step, see :class:`StageCache`; :func:`natural_width` when None.
        compiled: run decode steps through :class:`Graphs`, one graph per function and shape.
    """

    def __init__(self, model, form: str = "dense", stages: int | None = None, width: int | None = None, compiled=False):
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.width, self.form = width or natural_width(model), form
        linear = LINEARS[form]
        count = self.config.num_stages if stages is None else stages
        self.stages = [StageLayers(model, stage, linear) for stage in range(count)]
        self.heads = Heads(model, count, linear)
        self.graphs = Graphs(self.device) if compiled else None

    def copied(self, weights: dict[str, torch.Tensor]) -> list[str]:
        """Names of the weights that this engine holds in a form of its own: it does not see them change.

        A processor's graph holds all its weights; otherwise a weight is referred to where a module reads it in place.
        """
        names = [name for name in weights if stage_of(name, self.config) < len(self.stages)]
        if self.graphs is not None and self.device.type == "cpu":
            return names
        parts = [part for module in (*self.stages, self.heads) for part in module.modules()]
        in_place = [part for part in parts if getattr(part, "packed", None) is None]
        read = {buffer.data_ptr() for part in in_place for buffer in part.buffers(recurse=False)}
        return [name for name in names if weights[name].data_ptr() not in read]

    def run_stage(self, stage: int, width: int, span: int, table, ids, behind, states, keys, values) -> None:
        """Run a block of lanes through a stage, see :class:`StageLayers`; only decode steps are compiled."""
        is_step = width == self.width and span == ids.shape[1]
        tensors = (table, ids, behind, states, keys, values)
        self._call(("stage", stage, *ids.shape), self.stages[stage], (width, span), tensors, is_step)

    def logits(self, stage: int, table, states: torch.Tensor) -> torch.Tensor:
        """Capped fp32 logits ``[B, W, V]`` of one stage at a block's lanes, from its states ``[B, S, D]``."""
        fixed = (self.width, (stage,), None, 0.0)
        return self._call(("head", stage, *states.shape), self.heads, fixed, (table, states))

    def pool(self, stages: Sequence[int], table, states: Sequence[torch.Tensor], weights, alpha: float) -> torch.Tensor:
        """Log-probabilities ``[B, W, V]`` of the product of ``stages`` at a block's lanes, in one pass."""
        stages, weights = tuple(stages), tuple(weights or [1.0 / len(stages)] * len(stages))
        key = ("pool", stages, weights, alpha, *states[0].shape)
        return self._call(key, self.heads, (self.width, stages, weights, alpha), (table, *states))

    def _call(self, key: tuple, module: nn.Module, fixed: tuple, tensors: tuple, is_step: bool = True):
        """``module(*fixed, *tensors)``, or its graph; ``key`` tells function and shapes apart."""
        if self.graphs is None or not is_step:
            return module(*fixed, *tensors)
        return self.graphs.call(key, module, fixed, *tensors)


class Engines:
    """The engines of one model, made when first asked for and again when its weights have changed.

    They hang on the model object and are freed with it; its copies and pickles have none.
    """

    def __init__(self):
        self.width, self.compiled = None, False
        self._forget()

    def _forget(self) -> None:
        self.identity: list[tuple] = []
        self.made: dict[tuple[str, int], Engine] = {}
        self.measured: dict = {}
        self.digests: dict[str, torch.Tensor] = {}

    @classmethod
    def attached(cls, model) -> Engines:
        """The engines that hang on ``model``, whatever has become of its weights."""
        if ENGINES not in vars(model):
            setattr(model, ENGINES, cls())
        return vars(model)[ENGINES]

    @classmethod
    def of(cls, model) -> Engines:
        """The engines of ``model``; empty ones when its weights are not those that they were made from.

        What an engine refers to needs no look, what it copied is compared bit by bit (:func:`digest`).

        Raises:
            ValueError: the weights cannot be taken, see :func:`plain_weights`.
        """
        engines, weights = cls.attached(model), plain_weights(model)
        now = identity(weights)
        if engines.identity != now or engines._outdated(weights):
            engines._forget()
            engines.identity = now
        return engines

    def _outdated(self, weights: dict[str, torch.Tensor]) -> bool:
        if not self.digests:
            return False
        now = [digest(weights[name]) for name in self.digests]
        return not torch.equal(torch.cat(now), torch.cat(list(self.digests.values())))

    def get(self, model, form: str = "dense", stages: int | None = None) -> Engine:
        """The engine of a form of the weights for the first ``stages`` stages."""
        stages = model.config.num_stages if stages is None else stages
        if (form, stages) not in self.made:
            engine = self.made[form, stages] = Engine(model, form, stages, self.width, self.compiled)
            weights = plain_weights(model)
            for name in engine.copied(weights):
                if name not in self.digests:
                    self.digests[name] = digest(weights[name])
        return self.made[form, stages]

    def configure(self, width: int | None, compiled: bool) -> None:
        """Set the lanes of decode steps and whether they are compiled; drops engines made otherwise."""
        if (width, compiled) != (self.width, self.compiled):
            self.width, self.compiled = width, compiled
            self._forget()


def find_lanes(table: torch.Tensor, width: int, spare: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot of every lane ``[B, width]``, and where it writes: lanes that a row does not use write to slot ``spare``."""
    lane = torch.arange(width, device=table.device)
    slots = (table[0, :, None] + lane).clamp(max=spare)
    return slots, torch.where(lane < table[1, :, None], slots, spare)


def keep_tensors(module: nn.Module, **tensors: torch.Tensor | None) -> None:
    """Make tensors buffers of a module, so that a graph of it finds them."""
    for name, tensor in tensors.items():
        module.register_buffer(name, None if tensor is None else tensor.detach(), persistent=False)


def attention_dtype(config, dtype: torch.dtype) -> torch.dtype:
    """Dtype of attention and of the cached keys and values: kept as they are used, not converted at every step."""
    return torch.promote_types(dtype, torch.float32) if config.attention_in_fp32 else dtype


def _folded_head(model, stage: int) -> torch.Tensor:
    """``lm_head + lm_head_stages[stage]`` ``[V, D]``, added in fp32: one product instead of two."""
    shared = model.lm_head.weight.detach()
    if not model.config.per_stage_head:
        return shared
    wide = torch.promote_types(shared.dtype, torch.float32)
    return (shared.to(wide) + model.lm_head_stages[stage].weight.detach().to(wide)).to(shared.dtype)


def _small_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` for few channels ``[..., C]`` and outputs ``[O, C]``, where a product's call is all overhead."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide).unsqueeze(-2) * weight.to(wide)).sum(dim=-1).to(x.dtype)


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the halves of ``[B, W, heads, h]`` by minus theta."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
