"""The training objectives of a Product-of-Experts model: one backward pass over a micro-batch.

================  ==========================================================  ==============================
``poe_mode``      gradient between stages                                     loss
================  ==========================================================  ==============================
``flat``          residual stream detached at each stage start, x0 not        ``sum_k CE_k / K^(1-alpha)``
``hier``          full flow (deep supervision)                                the same
``none``          full flow                                                   CE of the plain path
================  ==========================================================  ==============================

In ``flat`` each stage's backward runs right after its forward and frees its activations: x0 enters every stage as a
leaf whose gradient is summed over the stages and sent back through the embedding once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cognica_poe.modeling.blocks_cognica_poe import Rotary, rmsnorm, rotary_factors
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.training.cross_entropy import softcap_cross_entropy

Masks = dict[str, Any]
"""Attention mask by layer type, in the form that the attention implementation wants."""

TRAINABLE_MODES = ("flat", "hier", "none")


class Objective:
    """Accumulates gradients of one micro-batch into the parameters' ``grad``.

    Args:
        model: the model; ``model.config.poe_mode`` chooses the objective, ``poe_alpha`` its scale.
        compute_dtype: fp32, or bf16 through autocast with fp32 weights.
        recompute: keep only the states before every layer, and compute what is inside again for its backward.
    """

    def __init__(
        self, model: CognicaPoEForCausalLM, compute_dtype: torch.dtype = torch.float32, recompute: bool = False
    ):
        self.model, self.compute_dtype, self.recompute = model, compute_dtype, recompute
        self.config = model.config
        self.mode = self.config.poe_mode
        if self.mode not in TRAINABLE_MODES:
            raise ValueError(
                f"poe_mode {self.mode!r} cannot be trained here; choose one of {', '.join(TRAINABLE_MODES)}"
            )
        self.stage_scale = self.config.num_stages ** (self.config.poe_alpha - 1.0)
        self._context: tuple[tuple[torch.Size, torch.device], Rotary, Masks] | None = None

    def backward(self, inputs: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Add ``scale`` times the gradient of the objective.

        Args:
            inputs, targets: token ids ``[B, T]``.
            scale: 1 / number of micro-batches under accumulation.

        Returns:
            The detached mean cross-entropy in nats of every stage, ``[K]`` (``[1]`` for ``none``).
        """
        device_type = inputs.device.type
        autocast = torch.autocast(device_type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)
        if self.mode == "flat":
            return self._flat(inputs, targets.reshape(-1), scale, autocast)
        with autocast:
            if self.mode == "none":
                total = self._plain_loss(inputs, targets.reshape(-1))
                losses = total[None]
            else:
                losses = self._connected_losses(inputs, targets.reshape(-1))
                total = losses.sum() * self.stage_scale
        torch.autograd.backward(total * scale)
        return losses.detach()

    def shared(self) -> dict[str, nn.Parameter]:
        """Parameters that every rank of a run must hold alike, by name: here all of them."""
        return dict(self.model.named_parameters())

    def sections(self) -> list[dict[str, int]]:
        """Parameters in the order in which ``backward`` completes their gradients, one section per layer or head.

        The value is the number of times that one ``backward`` adds to a parameter's gradient: once per stage for what
        ``flat`` shares between stages, 0 for what the mode never trains.
        """
        config, names = self.config, [name for name, _ in self.model.named_parameters()]
        shared = config.num_stages if self.mode == "flat" else 1
        sections: list[dict[str, int]] = []
        stages = range(config.num_stages) if self.mode == "flat" else reversed(range(config.num_stages))
        for stage in stages:
            heads = 0 if self.mode == "none" else 1
            sections.append({n: heads for n in names if n.startswith(f"lm_head_stages.{stage}.")})
            for layer in reversed(config.stage_layers(stage)):
                prefixes = (f"transformer.h.{layer}.", f"value_embeds.{layer}.")
                sections.append({n: 1 for n in names if n.startswith(prefixes)})
        counts = {"lm_head.weight": shared, "resid_lambdas": shared, "x0_lambdas": shared}
        counts["backout_lambda"] = 1 if self.mode == "none" else 0
        seen = {name for section in sections for name in section}
        sections.append({n: counts.get(n, 1) for n in names if n not in seen})
        return [section for section in sections if section]

    def _flat(self, ids: torch.Tensor, targets: torch.Tensor, scale: float, autocast: torch.autocast) -> torch.Tensor:
        """Forward and backward of one stage after the other; losses ``[K]``."""
        losses = []
        with autocast:
            x0_graph = self._embed(ids)
        x0 = x0_graph.detach().requires_grad_()
        rotary, masks = self._inputs(x0)
        x = x0
        for stage in range(self.config.num_stages):
            with autocast:
                x = self._run_layers(self.config.stage_layers(stage), x, x0, ids, rotary, masks)
                loss = self._stage_loss(x, stage, targets)
            torch.autograd.backward(loss * (scale * self.stage_scale))
            losses.append(loss.detach())
            x = x.detach()
        torch.autograd.backward(x0_graph, x0.grad)
        return torch.stack(losses)

    def _connected_losses(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses ``[K]`` of ``hier`` in one graph: every stage's gradient reaches the stages before it."""
        x0 = x = self._embed(ids)
        rotary, masks = self._inputs(x0)
        losses = []
        for stage in range(self.config.num_stages):
            x = self._run_layers(self.config.stage_layers(stage), x, x0, ids, rotary, masks)
            losses.append(self._stage_loss(x, stage, targets))
        return torch.stack(losses)

    def _plain_loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss (scalar) of ``none``: the plain path of the model, backout of the middle layer included."""
        model, config = self.model, self.config
        x0 = self._embed(ids)
        rotary, masks = self._inputs(x0)
        half = config.num_hidden_layers // 2 + 1
        middle = self._run_layers(range(half), x0, x0, ids, rotary, masks)
        x = self._run_layers(range(half, config.num_hidden_layers), middle, x0, ids, rotary, masks)
        n = rmsnorm(x - model.backout_lambda * middle, config.rms_norm_eps).flatten(0, 1)
        return softcap_cross_entropy(n, model.lm_head.weight, targets, config.logit_softcap)

    def _run_layers(
        self, layers: Iterable[int], x: torch.Tensor, x0: torch.Tensor, ids: torch.Tensor, rotary: Rotary, masks: Masks
    ) -> torch.Tensor:
        """The model's ``run_layers``, which keeps all activations or the states between layers."""
        if not self.recompute:
            return self.model.run_layers(layers, x, x0, ids, rotary, masks)
        for layer in layers:
            run = self.model.run_layers
            x = checkpoint(run, (layer,), x, x0, ids, rotary, masks, use_reentrant=False, preserve_rng_state=False)
        return x

    def _stage_loss(self, x: torch.Tensor, stage: int, targets: torch.Tensor) -> torch.Tensor:
        n = rmsnorm(x, self.config.rms_norm_eps).flatten(0, 1)
        return softcap_cross_entropy(n, self.model.head_weight(stage), targets, self.config.logit_softcap)

    def _inputs(self, x0: torch.Tensor) -> tuple[Rotary, Masks]:
        """Rotary factors and masks, made once per shape."""
        key = (x0.shape, x0.device)
        if self._context is None or self._context[0] != key:
            with torch.no_grad():
                positions = torch.arange(x0.shape[1], device=x0.device)[None]
                rotary = rotary_factors(positions, self.config.head_dim, self.config.rope_theta, x0.dtype)
                self._context = (key, rotary, self.model.masks(x0))
        return self._context[1:]

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embedding stream ``[B, T, D]``; the residual stream stays fp32 where weights are bf16 replicas."""
        x0 = self.model.embed(ids)
        return x0.float() if x0.dtype == torch.bfloat16 else x0
