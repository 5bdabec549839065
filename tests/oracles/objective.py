"""The training objectives as one graph with full logits."""

import torch

from cognica_poe.modeling.blocks_cognica_poe import rmsnorm
from tests.oracles.cross_entropy import reference_cross_entropy


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``x``, whose gradient counts ``factor`` times."""
    return factor * x + (1.0 - factor) * x.detach()


def stage_losses(model, inputs: torch.Tensor, targets: torch.Tensor, flow=None, weights=None) -> list[torch.Tensor]:
    """Mean cross-entropy of every stage, or of the plain path in ``none``, from token ids ``[B, T]``.

    ``flow`` is the share of the gradient that crosses a boundary, ``weights`` what each exit's counts in the trunk.
    """
    config, ids, targets = model.config, inputs, targets.reshape(-1)
    x0 = x = model.embed(ids)
    rotary, masks = model.rotary(torch.arange(ids.shape[1])[None]), model.masks(x0)

    def loss(x, weight):
        n = rmsnorm(x, config.rms_norm_eps).flatten(0, 1)
        return reference_cross_entropy(n, weight, targets, config.logit_softcap)

    if config.poe_mode == "none":
        half = config.num_hidden_layers // 2 + 1
        middle = model.run_layers(range(half), x, x0, ids, rotary, masks)
        x = model.run_layers(range(half, config.num_hidden_layers), middle, x0, ids, rotary, masks)
        return [loss(x - model.backout_lambda * middle, model.lm_head.weight)]
    losses, pooled = [], []
    flow = (1.0 if config.poe_mode == "hier" else 0.0) if flow is None else flow
    for stage in range(config.num_stages):
        x = model.run_layers(config.stage_layers(stage), scaled(x, flow) if stage else x, x0, ids, rotary, masks)
        at_exit = scaled(x, weights[stage] if weights else 1.0)
        if config.poe_mode == "residual_logop":
            losses.append(pool_loss(config, at_exit, model.head_weight(stage), targets, pooled))
        else:
            losses.append(loss(at_exit, model.head_weight(stage)))
    return losses


def pool_loss(config, x, weight, targets, pooled: list[torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the combiner's pool of a stage and the log-probabilities before it, to which it adds its own."""
    logits = rmsnorm(x, config.rms_norm_eps).flatten(0, 1) @ weight.T
    own = torch.log_softmax(config.logit_softcap * torch.tanh(logits / config.logit_softcap), dim=-1)
    members = torch.stack([*pooled, own])
    pooled.append(own.detach())
    score = len(members) ** config.poe_alpha * members.mean(dim=0)
    return torch.nn.functional.cross_entropy(score, targets)


def exit_losses(model, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Mean cross-entropy of every exit, each with a trunk and a shared head of its own that are not trained."""
    config, ids = model.config, inputs
    with torch.no_grad():
        x0 = model.embed(ids)
        rotary, masks = model.rotary(torch.arange(ids.shape[1])[None]), model.masks(x0)
        states = [model.run_layers(range(layer), x0, x0, ids, rotary, masks) for layer in config.poe_exit_layers]
    losses = []
    for x, head in zip(states, model.lm_head_exits, strict=True):
        weight = model.lm_head.weight.detach() + head.weight
        n = rmsnorm(x, config.rms_norm_eps).flatten(0, 1)
        losses.append(reference_cross_entropy(n, weight, targets.reshape(-1), config.logit_softcap))
    return losses


def one_shot_loss(model, inputs: torch.Tensor, targets: torch.Tensor, flow=None, weights=None) -> torch.Tensor:
    """The objective: ``sum_k CE_k / K^(1 - alpha)``, in ``none`` the plain path's cross-entropy (scalar)."""
    losses, config = stage_losses(model, inputs, targets, flow, weights), model.config
    if config.poe_mode == "none":
        return losses[0]
    return sum(losses) / config.num_stages ** (1.0 - config.poe_alpha)
