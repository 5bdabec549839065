"""What a recipe's model costs wherever it runs: parameters, optimiser state, activations, floating-point operations.

Computed from the model itself, built on the meta device. The tests compare each figure with measurement: the state
that the optimiser really holds, torch's operation counter, the peak of the allocator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.build import build_model
from cognica_poe.training.cross_entropy import block_rows, chunk_rows
from cognica_poe.training.objective import Objective
from cognica_poe.training.optim.groups import group_of
from cognica_poe.training.optim.muon import ITERATIONS, second_moment_shape


@dataclass(frozen=True)
class Figure:
    """A number with the formula behind it."""

    name: str
    value: float
    formula: str


class Costs:
    """Figures of one checked recipe. Raises UserError when its shape contradicts itself."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        with torch.device("meta"):
            model = build_model(recipe.model)
        self.config: CognicaPoEConfig = model.config
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        training = recipe.training
        objective = Objective(model, options=training.objective)
        objective.begin(0.0 if training.objective.late_from else 1.0)
        self.sections = objective.sections()
        flows = [training.objective.flow(recipe.model.poe_mode, share) for share in (0.0, 1.0)]
        self.connected = recipe.model.poe_mode != "none" and max(flows) > 0.0
        """Gradients cross stages, at the end of the run at least."""
        self.matrices = [shape for name, shape in self.shapes.items() if group_of(name) == "muon"]
        self.others = [shape for name, shape in self.shapes.items() if group_of(name) != "muon"]
        self.muon_parameters = sum(map(math.prod, self.matrices))
        self.adamw_parameters = sum(map(math.prod, self.others))
        self.parameters = self.muon_parameters + self.adamw_parameters
        self.query_width = self.config.num_attention_heads * self.config.head_dim
        self.key_width = self.config.num_key_value_heads * self.config.head_dim
        self.muon_bytes = getattr(torch, recipe.training.optimizer.muon_dtype).itemsize

    # ---- memory ---------------------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Optimiser state: momentum and factored second moment, or two AdamW moments, all in fp32."""
        normalised = self.recipe.training.optimizer.muon_beta2 < 1.0
        factored = sum(math.prod(second_moment_shape(*shape)) for shape in self.matrices) if normalised else 0
        return 4 * (self.muon_parameters + factored) + 8 * self.adamw_parameters

    def buckets(self) -> list[int]:
        """Parameters whose gradients travel together: a layer with its value embedding, a stage head, the rest."""
        return [sum(math.prod(self.shapes[name]) for name in section) for section in self.sections]

    def layer_bytes(self, layer: int, dtype_bytes: int) -> int:
        """Bytes per token that a layer keeps for its backward, by the operations of ``Block``.

        In fp32: three states of the residual stream, queries and keys before their norm. In the compute dtype: two
        normed states, queries, keys, values, attended values, twice the MLP's width; below fp32 also the casts that
        autocast makes, one of the first normed state per projection and one of the attended values.
        """
        config, D, qd, kd, c = self.config, self.config.hidden_size, self.query_width, self.key_width, dtype_bytes
        kept = 4 * (3 * D + qd + kd) + c * (2 * D + 2 * qd + 2 * kd + 2 * config.intermediate_size)
        casts = c * (2 * D + qd) if c < 4 else 0
        return kept + casts + (c * kd if config.has_value_embedding(layer) else 0)

    def live_layers(self) -> range:
        """Layers whose activations are held at once: the largest stage's where stages run one by one or again."""
        stages = [self.config.stage_layers(k) for k in range(self.config.num_stages)]
        one_by_one = self.recipe.training.recompute == "stages" if self.connected else self.config.poe_mode != "none"
        return max(stages, key=len) if one_by_one else range(self.config.num_hidden_layers)

    def activations(self, rows: int, dtype_bytes: int, device: str = "cuda") -> list[Figure]:
        """Bytes of the activations and scratch of a micro-batch of ``rows`` rows, by part."""
        config, layers, c = self.config, self.live_layers(), dtype_bytes
        D, V, R = config.hidden_size, config.vocab_size, rows * config.max_position_embeddings
        K = config.num_stages
        exits = len(config.poe_exit_layers)
        heads = K + exits if self.connected else 1 + max(len(config.exits_of(stage)) for stage in range(K))
        chunk = chunk_rows(R, V, torch.device(device))
        block = block_rows(chunk, V, torch.device(device))
        per_layer = [self.layer_bytes(layer, c) for layer in layers]
        formula = "R (4 (3 D + qd + kd) + c (2 D + 2 qd + 2 kd + 2 I)) per layer, + casts, + c R kd per value embedding"
        kept, logits = R * sum(per_layer), V * (chunk * c + block * 8)
        if self.recipe.training.recompute == "stages":  # an earlier stage's own come back when the logits have gone
            *others, last = [
                sum(self.layer_bytes(i, c) for i in config.stage_layers(k)) for k in range(config.num_stages)
            ]
            kept = R * 4 * D * config.num_stages + max(R * last, R * max(others, default=0) - logits)
            formula += ", of the last stage or of what an earlier one's exceed the logits by, + 4 R D per stage"
        if self.recipe.training.recompute == "layers":  # a layer's own come back when the logits have gone
            kept = R * 4 * D * len(layers) + max(0, R * max(per_layer) - logits)
            formula = "4 R D per layer, + what one layer's own exceed the logits by"
        return [
            Figure(f"activations of {len(layers)} layers", kept, formula),
            Figure("embeddings and boundary", 28 * R * D, "7 x 4 R D"),
            Figure("logits chunk", logits, "V (c rows of a chunk + 8 rows of a block)"),
            Figure(
                "folded head and its gradient",
                heads * (V * D * (4 + c) + R * D * c),
                "V D (4 + c) + c R D" + ((" per head" if exits else " per stage") if heads > 1 else ""),
            ),
        ]

    # ---- work -----------------------------------------------------------------------------------------------------

    def product_flops_per_token(self) -> int:
        """Forward and backward of every product with a weight: 6 per weight, 4 of an exit, which sends nothing back.

        ``residual_logop`` makes the logits of all earlier stages again for each stage's pool: 2 per weight.
        """
        K = self.config.num_stages
        heads, matrix = 1 if self.config.poe_mode == "none" else K, self.config.vocab_size * self.config.hidden_size
        again = K * (K - 1) // 2 if self.config.poe_mode == "residual_logop" else 0
        return 6 * (self.muon_parameters + heads * matrix) + (4 * len(self.config.poe_exit_layers) + 2 * again) * matrix

    def flops_per_token(self) -> int:
        """Products, and attention over each layer's whole window, causality not discounted (the usual convention)."""
        config, T = self.config, self.config.max_position_embeddings
        windows = [T if kind == "full_attention" else min(config.short_window, T) for kind in config.layer_types]
        return self.product_flops_per_token() + 12 * self.query_width * sum(windows)

    def recomputed_flops_per_token(self) -> int:
        """The trunk's second forward where activations are not kept; no part of ``flops_per_token``."""
        in_heads = self.product_flops_per_token() - 6 * self.muon_parameters
        trunk = self.flops_per_token() - in_heads
        again = {"off": 0, "layers": self.config.num_hidden_layers}
        again["stages"] = self.config.num_hidden_layers - self.config.poe_stage_layers[-1]
        return trunk * again[self.recipe.training.recompute] // (3 * self.config.num_hidden_layers)

    def newton_schulz_flops(self) -> list[int]:
        """Of every matrix: ``steps x (4 m^2 n + 2 m^3)`` with m the shorter side."""
        steps = len(ITERATIONS[self.recipe.training.optimizer.muon_iteration])
        sides = ((min(shape), max(shape)) for shape in self.matrices)
        return [steps * (4 * m * m * n + 2 * m**3) for m, n in sides]
