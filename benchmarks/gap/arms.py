"""The arms of the study: one shape, one order of data, one optimiser; what differs is how the stages learn.

``C`` are controls, ``T`` are trials. All arms of a seed read the same rows; those in four stages (all but C0, C2, T9)
have the same parameters and begin with the same weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from cognica_poe.recipe.fields import (
    DataRecipe,
    GuardRecipe,
    ModelRecipe,
    ObjectiveRecipe,
    OptimizerRecipe,
    Recipe,
    ReleaseRecipe,
    ScheduleRecipe,
    TrainingRecipe,
)
from cognica_poe.recipe.rules import check

LAYERS, STAGES = 12, (3, 3, 3, 3)
TOKENS_PER_STEP = 8192
MILLION = 1_000_000
TUNING_TOKENS = 5 * MILLION
"""Budget at which the rates of an arm are tried."""

MODEL = ModelRecipe(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    window_pattern="L",
    poe_stage_layers=STAGES,
    stage_head_rank=16,
)
"""Twelve layers: the gate asks that backprop through all of them be 5 % better than through the first three."""

TUNED = ("matrix_lr", "unembedding_lr")
"""Learning rates that are tuned for every arm."""
EARLY_EXITS = (0.2, 0.2, 0.2, 1.0)
LAST_EXIT = (0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Arm:
    """One way to train the shape."""

    name: str
    about: str
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of the shape that differ."""
    objective: ObjectiveRecipe = field(default_factory=ObjectiveRecipe)


_FULL_FLOW = {"poe_mode": "hier"}
_ONE_PATH = {"poe_mode": "none", "per_stage_head": False, "stage_head_rank": 0}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("C0", "backprop, one head, backout", {**_ONE_PATH, "poe_stage_layers": (LAYERS,)}),
        Arm("C1", "backprop, exits that teach nothing", _FULL_FLOW, ObjectiveRecipe(exit_weights=LAST_EXIT)),
        Arm(
            "C2",
            "backprop of stage 0's layers alone",
            {**_ONE_PATH, "num_hidden_layers": STAGES[0], "poe_stage_layers": STAGES[:1]},
        ),
        Arm("T1", "flat: local losses"),
        Arm("T2", "hier: full flow, exits of weight 1", _FULL_FLOW),
        Arm(
            "T3",
            "full flow, early exits of weight 0.2",
            _FULL_FLOW,
            ObjectiveRecipe(exit_weights=EARLY_EXITS),
        ),
        Arm(
            "T4",
            "T3, gradients applied a step late",
            _FULL_FLOW,
            ObjectiveRecipe(exit_weights=EARLY_EXITS, gradient_delay=1),
        ),
        Arm(
            "T4e",
            "T4 with error feedback",
            _FULL_FLOW,
            ObjectiveRecipe(exit_weights=EARLY_EXITS, gradient_delay=1, error_feedback=True),
        ),
        Arm(
            "T5",
            "flat for half of the run, then T3",
            {},
            ObjectiveRecipe(exit_weights=EARLY_EXITS, gradient_flow=0.0, late_gradient_flow=1.0, late_from=0.5),
        ),
        Arm("T9", "flat in two stages of 8 and 4 layers", {"poe_stage_layers": (8, 4)}),
    )
}


RELATIVES = {"T2": "T3", "T4e": "T4", "T5": "T3", "T9": "T1"}
"""Arms that take the rates tuned for another, their nearest relative."""


@dataclass(frozen=True)
class Job:
    """One training of an arm."""

    arm: str
    tokens: int
    seed: int
    rate: float = 1.0
    """Factor of the learning rates of the matrices and of the heads."""

    @property
    def name(self) -> str:
        """Of its run folder and its result."""
        return f"{self.arm}-{self.tokens / MILLION:g}M-r{self.rate:g}-s{self.seed}"


def steps_of(tokens: int) -> int:
    """Steps that read at least ``tokens`` tokens."""
    return -(-tokens // TOKENS_PER_STEP)


def base_recipe(text: str, seed: int) -> Recipe:
    """Data and shape that all arms of a seed share; every seed reads the rows in an order of its own."""
    return Recipe(
        name="gap",
        model=MODEL,
        data=DataRecipe(mix=text, case_aug_prob=0.0, tokenizer_bytes=20 * MILLION, seed=seed),
        training=TrainingRecipe(
            steps=1,
            batch_rows=TOKENS_PER_STEP // MODEL.max_position_embeddings,
            micro_rows=16,
            compute_dtype="bfloat16",
            compile="on",
            checkpoint_every=100,
            keep_checkpoints=1,
            seed=seed,
            schedule=ScheduleRecipe(warmup_steps=1, momentum_warmup_steps=1),
            optimizer=OptimizerRecipe(lr_scaling=False, weight_decay=0.1, matrix_lr=0.02),
            guard=GuardRecipe(spike_sigma=0.0),  # no arm is helped along
        ),
        release=ReleaseRecipe(repo_id="cognica/gap", every=10**9, log_steps=False),
    )


def recipe_of(job: Job, text: str) -> Recipe:
    """The recipe of a job: its run has its own warm-up and its own end of warm-down."""
    arm, base = ARMS[job.arm], base_recipe(text, job.seed)
    steps, optimizer = steps_of(job.tokens), base.training.optimizer
    training = dataclasses.replace(
        base.training,
        steps=steps,
        objective=arm.objective,
        # All that takes time in a run scales with its length: a short run sees the same schedule.
        schedule=ScheduleRecipe(warmup_steps=max(1, steps // 40), momentum_warmup_steps=max(1, steps // 10)),
        optimizer=dataclasses.replace(optimizer, **{name: job.rate * getattr(optimizer, name) for name in TUNED}),
    )
    model = dataclasses.replace(base.model, **arm.model)
    return check(dataclasses.replace(base, name=job.name, model=model, training=training))
