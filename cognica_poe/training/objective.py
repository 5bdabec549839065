"""The training objectives of a Product-of-Experts model: one backward pass over a micro-batch.

One family: at the end of stage k the trunk receives ``gamma_k`` times the gradient of the stage's own cross-entropy and
``beta`` times what comes back from the deeper stages. The heads always receive the whole gradient of their loss, x0 is
never detached, and the value is ``sum_k CE_k / K^(1-alpha)``. Exits inside stages add their own cross-entropies, each
from detached states and through a head whose shared part is detached: what they send reaches their own heads alone.

==================  ============================  ==================================================================
``poe_mode``        ``beta``, ``gamma`` preset    what it is
==================  ============================  ==================================================================
``flat``            0, 1                          local losses: no gradient crosses the residual stream
``hier``            1, 1                          deep supervision: full flow
``none``            -                             ordinary backprop of the plain path, one head
``residual_logop``  0, 1                          as flat, but a stage's loss is that of its pool with the stages before
                                                  it, which are constants in it: it learns what they lack
==================  ============================  ==================================================================

Where beta is 0, each stage's backward runs right after its forward and frees its activations: x0 enters every stage as
a leaf whose gradient is summed over the stages and sent back through the embedding once. Elsewhere the stages are one
graph, of which ``recompute`` keeps only the states between layers or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cognica_poe.modeling.blocks_cognica_poe import Rotary, rmsnorm, rotary_factors
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import ObjectiveRecipe
from cognica_poe.training.cross_entropy import softcap_cross_entropy
from cognica_poe.training.residual import Member, residual_cross_entropy

Masks = dict[str, Any]
"""Attention mask by layer type, in the form that the attention implementation wants."""

States = dict[int, torch.Tensor]
"""Detached states ``[B, T, D]`` by exit."""


class Objective:
    """Accumulates gradients of one micro-batch into the parameters' ``grad``.

    Args:
        model: the model; ``model.config.poe_mode`` chooses the preset, ``poe_alpha`` the scale of the value.
        compute_dtype: fp32, or bf16 through autocast with fp32 weights.
        recompute: what is not kept but computed again for the backward: ``off`` nothing, ``layers`` all but the states
            before every layer, ``stages`` all but the states before every stage (for beta above 0).
        options: beta, gamma and their schedule; the preset's where they are omitted.
    """

    def __init__(
        self,
        model: CognicaPoEForCausalLM,
        compute_dtype: torch.dtype = torch.float32,
        recompute: str = "off",
        options: ObjectiveRecipe | None = None,
    ):
        self.model, self.compute_dtype, self.recompute = model, compute_dtype, recompute
        self.config, self.options = model.config, options or ObjectiveRecipe()
        self.mode = self.config.poe_mode
        K = self.config.num_stages
        self.stage_scale = K ** (self.config.poe_alpha - 1.0)
        self.exit_weights = self.options.exit_weights or (1.0,) * K
        self.gradient_flow = self.options.flow(self.mode, 0.0)
        """beta of the step under way."""
        self.paths = 1 if self.mode == "none" else K
        """How many of the losses that ``backward`` returns are those of stages; those of exits come behind them."""
        self._context: tuple[tuple[torch.Size, torch.device], Rotary, Masks] | None = None
        self._pool: list[Member] = []
        """With ``residual_logop``, the stages of this micro-batch whose losses are computed, as constants."""

    @property
    def stage_by_stage(self) -> bool:
        """Whether each stage's backward runs right after its forward: no gradient crosses."""
        return self.mode != "none" and self.gradient_flow == 0.0

    def begin(self, progress: float) -> bool:
        """Take the beta that holds at ``progress``, the share of the run's steps that is done. True where the order of
        gradients changes by it: ``sections`` says another one then."""
        before, self.gradient_flow = self.stage_by_stage, self.options.flow(self.mode, progress)
        return self.stage_by_stage != before

    def backward(self, inputs: torch.Tensor, targets: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Add ``scale`` times the gradient of the objective.

        Args:
            inputs, targets: token ids ``[B, T]``.
            scale: 1 / number of micro-batches under accumulation.

        Returns:
            The detached mean cross-entropy in nats of every stage (``none``: of its one path; ``residual_logop``: of
            the pool so far), then of every exit, ``[K + E]`` (``[1 + E]``).
        """
        self._pool.clear()
        device_type = inputs.device.type
        autocast = torch.autocast(device_type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)
        if self.stage_by_stage:
            return self._local(inputs, targets.reshape(-1), scale, autocast)
        with autocast:
            if self.mode == "none":
                loss, exits = self._plain_loss(inputs, targets.reshape(-1))
                losses, factor = loss[None], 1.0
            else:
                losses, exits = self._connected_losses(inputs, targets.reshape(-1))
                factor = self.stage_scale
            total = sum(exits, losses.sum()) * factor
        torch.autograd.backward(total * scale)
        return torch.stack([*losses, *exits]).detach()

    def shared(self) -> dict[str, nn.Parameter]:
        """Parameters that every rank of a run must hold alike, by name: here all of them."""
        return dict(self.model.named_parameters())

    def sections(self) -> list[dict[str, int]]:
        """Parameters in the order in which ``backward`` completes their gradients, one section per layer or head.

        The value is the number of times that one ``backward`` adds to a parameter's gradient: once per stage for what
        stages share that run one by one, 0 for what the mode never trains.
        """
        config, names = self.config, [name for name, _ in self.model.named_parameters()]
        shared = config.num_stages if self.stage_by_stage else 1
        count = len(config.poe_exit_layers)
        exits = [{n: 1 for n in names if n.startswith(f"lm_head_exits.{exit}.")} for exit in range(count)]
        sections: list[dict[str, int]] = [*reversed(exits)] if self.mode == "none" else []
        stages = range(config.num_stages) if self.stage_by_stage else reversed(range(config.num_stages))
        for stage in stages:
            heads = 0 if self.mode == "none" else 1
            sections.append({n: heads for n in names if n.startswith(f"lm_head_stages.{stage}.")})
            sections += [] if self.mode == "none" else [exits[exit] for exit in reversed(config.exits_of(stage))]
            for layer in reversed(config.stage_layers(stage)):
                prefixes = (f"transformer.h.{layer}.", f"value_embeds.{layer}.")
                sections.append({n: 1 for n in names if n.startswith(prefixes)})
        counts = {"lm_head.weight": shared, "resid_lambdas": shared, "x0_lambdas": shared}
        counts["backout_lambda"] = 1 if self.mode == "none" else 0
        seen = {name for section in sections for name in section}
        sections.append({n: counts.get(n, 1) for n in names if n not in seen})
        return [section for section in sections if section]

    def _local(self, ids: torch.Tensor, targets: torch.Tensor, scale: float, autocast: torch.autocast) -> torch.Tensor:
        """Forward and backward of one stage after the other; losses ``[K + E]``."""
        losses, of_exits = [], []
        with autocast:
            x0_graph = self._embed(ids)
        x0 = x0_graph.detach().requires_grad_()
        rotary, masks = self._inputs(x0)
        x = x0
        for stage in range(self.config.num_stages):
            with autocast:
                x, states = self._through(self.config.stage_layers(stage), x, x0, ids, rotary, masks)
                exits = self._exit_losses(states, targets)
                loss = self._stage_loss(x, stage, targets)
            torch.autograd.backward(sum(exits, loss) * (scale * self.stage_scale))
            losses.append(loss.detach())
            of_exits += [loss.detach() for loss in exits]
            x = x.detach()
        torch.autograd.backward(x0_graph, x0.grad)
        return torch.stack(losses + of_exits)

    def _connected_losses(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Losses ``[K]`` in one graph, where of a stage's gradient beta reaches the one before; losses of the exits."""
        x0 = x = self._embed(ids)
        rotary, masks = self._inputs(x0)
        losses, of_exits = [], []
        for stage in range(self.config.num_stages):
            x, states = self._run_stage(
                stage, x if stage == 0 else scale_gradient(x, self.gradient_flow), x0, ids, rotary, masks
            )
            of_exits += self._exit_losses(states, targets)
            losses.append(self._stage_loss(x, stage, targets))
        return torch.stack(losses), of_exits

    def _run_stage(
        self, stage: int, x: torch.Tensor, x0: torch.Tensor, ids: torch.Tensor, rotary: Rotary, masks: Masks
    ) -> tuple[torch.Tensor, States]:
        """A stage's layers; with ``recompute`` by stages only the last one, whose backward comes first, is kept.

        Returns what :func:`through` does.
        """
        inputs = (self.config.stage_layers(stage), x, x0, ids, rotary, masks)
        if self.recompute != "stages" or stage + 1 == self.config.num_stages:
            return self._through(*inputs)
        # The model that runs now: with delayed stages another one is current when this is computed again.
        run = partial(through, self.model.run_layers, self.config.poe_exit_layers)
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]  # torch's

    def _through(
        self, layers: range, x: torch.Tensor, x0: torch.Tensor, ids: torch.Tensor, rotary: Rotary, masks: Masks
    ) -> tuple[torch.Tensor, States]:
        """The state behind ``layers``, and detached ones at the exits that they reach."""
        return through(self._run_layers, self.config.poe_exit_layers, layers, x, x0, ids, rotary, masks)

    def _plain_loss(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Loss (scalar) of ``none``, the plain path with its backout of the middle layer, and those of the exits."""
        model, config = self.model, self.config
        x0 = self._embed(ids)
        rotary, masks = self._inputs(x0)
        half = config.num_hidden_layers // 2 + 1
        middle, states = self._through(range(half), x0, x0, ids, rotary, masks)
        x, deeper = self._through(range(half, config.num_hidden_layers), middle, x0, ids, rotary, masks)
        exits = self._exit_losses({**states, **deeper}, targets)
        n = rmsnorm(x - model.backout_lambda * middle, config.rms_norm_eps).flatten(0, 1)
        return softcap_cross_entropy(n, model.lm_head.weight, targets, config.logit_softcap), exits

    def _run_layers(
        self, layers: Iterable[int], x: torch.Tensor, x0: torch.Tensor, ids: torch.Tensor, rotary: Rotary, masks: Masks
    ) -> torch.Tensor:
        """The model's ``run_layers``, which keeps all activations or the states between layers."""
        if self.recompute != "layers":
            return self.model.run_layers(layers, x, x0, ids, rotary, masks)
        for layer in layers:
            run = self.model.run_layers
            x = checkpoint(run, (layer,), x, x0, ids, rotary, masks, use_reentrant=False, preserve_rng_state=False)
        return x

    def _stage_loss(self, x: torch.Tensor, stage: int, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (scalar) of a stage's head, or of its pool with those before it, which teaches the trunk with
        the weight gamma of the exit."""
        x, config = scale_gradient(x, self.exit_weights[stage]), self.config
        n, weight = rmsnorm(x, config.rms_norm_eps).flatten(0, 1), self.model.head_weight(stage)
        if self.mode != "residual_logop":
            return softcap_cross_entropy(n, weight, targets, config.logit_softcap)
        loss = residual_cross_entropy(n, weight, targets, config.logit_softcap, config.poe_alpha, self._pool)
        self._pool.append((n.detach(), weight.detach()))
        return loss

    def _exit_losses(self, states: States, targets: torch.Tensor) -> list[torch.Tensor]:
        """Cross-entropies (scalars) of exits, which teach their own heads and nothing else."""
        losses = []
        for exit, x in states.items():
            n = rmsnorm(x, self.config.rms_norm_eps).flatten(0, 1)
            losses.append(softcap_cross_entropy(n, self.model.exit_weight(exit), targets, self.config.logit_softcap))
        return losses

    def no_losses(self, like: torch.Tensor) -> torch.Tensor:
        """Room for the losses ``[K + E]`` of a rank that computes some of them, zeros in the dtype of ``like``."""
        return like.new_zeros(self.config.num_stages + len(self.config.poe_exit_layers))

    def put_losses(
        self, losses: torch.Tensor, stage: int, loss: torch.Tensor, exits: list[torch.Tensor], factor: int
    ) -> None:
        """Note a stage's loss and those of its exits, times ``factor``."""
        losses[stage] = loss.detach() * factor
        for exit, value in zip(self.config.exits_of(stage), exits, strict=True):
            losses[self.config.num_stages + exit] = value.detach() * factor

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


def through(
    run: Callable[..., torch.Tensor], exits: Sequence[int], layers: range, x: torch.Tensor, *context: Any
) -> tuple[torch.Tensor, States]:
    """``run`` the state ``x`` ``[B, T, D]`` through ``layers``, stopping at ``exits``, given by the layers before them.

    Returns:
        the state behind them, and the detached states at the exits on the way.
    """
    states, start = {}, layers.start
    for exit, layer in enumerate(exits):
        if start < layer <= layers.stop:
            x = run(range(start, layer), x, *context)
            states[exit], start = x.detach(), layer
    return (x if start == layers.stop else run(range(start, layers.stop), x, *context)), states


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_output * ctx.factor, None


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``x``, with its gradient times ``factor``: itself for 1, detached for 0."""
    if factor == 1.0:
        return x
    if factor == 0.0:
        return x.detach()
    scaled: torch.Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]  # torch's
    return scaled
