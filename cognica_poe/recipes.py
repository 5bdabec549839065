"""Recipes: everything that decides a run, as frozen dataclasses. A run folder keeps its own as ``recipe.json``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from cognica_poe.errors import UserError
from cognica_poe.files import read_json, write_json
from cognica_poe.training.optimizer import OptimizerRecipe
from cognica_poe.training.schedule import ScheduleRecipe

LOG_STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class ModelRecipe:
    """Shape and objective; the fields carry the names of the released config."""

    vocab_size: int = 32768
    """Tokens of the vocabulary, 9 specials included."""
    hidden_size: int = 2048
    intermediate_size: int = 12800
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 2048
    """Context length in tokens; also the row length of training."""
    window_pattern: str = "SSSL"
    """S short, L long window, tiled over the layers; the last layer is always long."""
    short_window: int | None = None
    """Tokens before itself that a short layer sees; a quarter of the context, rounded up to 128, when omitted."""
    poe_mode: Literal["flat", "hier", "none"] = "flat"
    """flat: local losses; hier: deep supervision; none: ordinary backprop."""
    poe_alpha: float = 0.0
    """Exponent of the number of experts, in the loss and in the pool."""
    poe_stage_layers: tuple[int, ...] = (16, 6, 5, 5)
    """Layers of every stage."""
    per_stage_head: bool = True
    """Every stage has a head of its own beside the shared one."""


@dataclass(frozen=True)
class DataRecipe:
    """Where the text comes from and how it becomes rows."""

    mix: str = "frontier_v1"
    """Name of a mix, or path of a folder or file of parquet, jsonl or text."""
    val_fraction: float = 0.02
    """Share of the documents held out for validation."""
    val_min_bytes: int = 200_000
    """Hold out at least this much text."""
    max_bytes: int | None = None
    """Stop reading after this many bytes of text."""
    case_aug_prob: float = 0.15
    """Probability that a document is lower-cased (80 %) or upper-cased (20 %) in an epoch."""
    tokenizer_bytes: int = 60_000_000
    """Text the tokenizer is trained on, in bytes."""
    seed: int = 0


@dataclass(frozen=True)
class TrainingRecipe:
    """One optimiser run."""

    steps: int = 83_923
    batch_rows: int = 384
    """Rows of one optimiser step over all ranks."""
    micro_rows: int = 8
    """Rows of one forward and backward pass on one rank."""
    seed: int = 0
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto measures which of the two the processor multiplies faster; weights stay fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: on for CUDA, off elsewhere."""
    attention: Literal["sdpa", "flex_attention"] = "sdpa"
    """flex_attention skips what a sliding window hides, on CUDA; sdpa masks it. It trains on CUDA alone."""
    recompute: bool = False
    """Keep only the states between layers and compute the rest again in the backward: less memory, 1/3 more work."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 3
    """Rolling checkpoints kept; released steps are kept as well."""
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)


@dataclass(frozen=True)
class ReleaseRecipe:
    """Which steps are measured and published."""

    repo_id: str = "cognica/poe"
    """Name of the repository, org/name."""
    every: int = 2000
    """Release every this many steps, and the last one."""
    log_steps: bool = True
    """Also release steps 0, 1, 2, 4 ... 512."""
    val_max_bytes: int | None = None
    """Measure on this much validation text; all of it when omitted."""
    wand_safety: float = 1.0
    draft_length: int = 4
    """Drafted tokens per round when speculative acceptance is measured."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    release: ReleaseRecipe = field(default_factory=ReleaseRecipe)

    def released_steps(self) -> list[int]:
        """Steps to release, in order; the last step is always one."""
        steps = self.training.steps
        chosen = set(range(self.release.every, steps, self.release.every)) | {steps}
        if self.release.log_steps:
            chosen |= {step for step in LOG_STEPS if step <= steps}
        return sorted(chosen)

    def check(self) -> Recipe:
        """Return self. Raises UserError for a value that no run can have."""
        model, data, training = self.model, self.data, self.training
        for name, value, low in (
            ("training.steps", training.steps, 1),
            ("training.batch-rows", training.batch_rows, 1),
            ("training.micro-rows", training.micro_rows, 1),
            ("training.checkpoint-every", training.checkpoint_every, 1),
            ("training.keep-checkpoints", training.keep_checkpoints, 1),
            ("training.schedule.warmup-steps", training.schedule.warmup_steps, 0),
            ("release.every", self.release.every, 1),
            ("release.draft-length", self.release.draft_length, 1),
            ("data.val-min-bytes", data.val_min_bytes, 1),
            ("model.vocab-size", model.vocab_size, 266),
            ("model.max-position-embeddings", model.max_position_embeddings, 8),
        ):
            if value < low:
                raise UserError(f"recipe {self.name}: {name} is {value}; it must be at least {low}")
        for name, number in _numbers(dataclasses.asdict(self)):
            if not math.isfinite(number) or (number < 0 and name != "model.poe-alpha"):
                raise UserError(f"recipe {self.name}: {name} is {number}; it must be a number that is not negative")
        for name, share in (
            ("data.val-fraction", data.val_fraction),
            ("data.case-aug-prob", data.case_aug_prob),
            ("training.schedule.warmdown-ratio", training.schedule.warmdown_ratio),
        ):
            if not 0.0 <= share <= 1.0:
                raise UserError(f"recipe {self.name}: {name} is {share}; it must lie between 0 and 1")
        if training.batch_rows % training.micro_rows:
            raise UserError(
                f"recipe {self.name}: training.batch-rows {training.batch_rows} is not a multiple of "
                f"training.micro-rows {training.micro_rows}"
            )
        if self.release.repo_id.count("/") != 1:
            raise UserError(f"recipe {self.name}: release.repo-id {self.release.repo_id!r} must read org/name")
        return self

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, dataclasses.asdict(self))


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested recipe with its option name."""
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', '-')}"
        if isinstance(value, dict):
            yield from _numbers(value, f"{name}.")
        elif isinstance(value, int | float):
            yield name, value


def _backprop_arm(recipe: Recipe) -> Recipe:
    """The control arm: same shape, data, seed and steps, ordinary backprop, one head."""
    model = dataclasses.replace(
        recipe.model, poe_mode="none", poe_stage_layers=(recipe.model.num_hidden_layers,), per_stage_head=False
    )
    release = dataclasses.replace(recipe.release, repo_id=recipe.release.repo_id + "-bp")
    return dataclasses.replace(recipe, name=recipe.name + "-bp", model=model, release=release)


def _named() -> dict[str, Recipe]:
    tiny = Recipe(
        name="tiny",
        model=ModelRecipe(
            vocab_size=2048,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=64,
            max_position_embeddings=256,
            window_pattern="L",
            poe_stage_layers=(3, 2, 1),
        ),
        data=DataRecipe(mix="python-docs", case_aug_prob=0.0),
        training=TrainingRecipe(
            steps=200,
            batch_rows=16,
            micro_rows=16,
            checkpoint_every=50,
            schedule=ScheduleRecipe(warmup_steps=10, momentum_warmup_steps=100),
            optimizer=OptimizerRecipe(lr_scaling=False, matrix_lr=0.02, weight_decay=0.1),
        ),
        release=ReleaseRecipe(repo_id="cognica/tiny-poe", every=50, log_steps=False),
    )
    # Half of its layers draft for the other half: the shape on which decoding is measured.
    deep = Recipe(
        name="deep",
        model=ModelRecipe(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=512,
            window_pattern="L",
            poe_stage_layers=(8, 8),
        ),
        data=DataRecipe(mix="python-docs", case_aug_prob=0.0),
        training=TrainingRecipe(
            steps=600,
            batch_rows=8,
            micro_rows=8,
            checkpoint_every=100,
            schedule=ScheduleRecipe(warmup_steps=20, momentum_warmup_steps=200),
            optimizer=OptimizerRecipe(lr_scaling=False, matrix_lr=0.02, weight_decay=0.1),
        ),
        release=ReleaseRecipe(repo_id="cognica/deep-poe", every=300, log_steps=False),
    )
    small = Recipe(
        name="small",
        model=ModelRecipe(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=1024,
            poe_stage_layers=(6, 2, 2, 2),
        ),
        data=DataRecipe(mix="python-docs"),
        training=TrainingRecipe(
            steps=5000,
            batch_rows=64,
            micro_rows=8,
            checkpoint_every=250,
            schedule=ScheduleRecipe(warmup_steps=100),
            optimizer=OptimizerRecipe(lr_scaling=False, matrix_lr=0.02, weight_decay=0.05),
        ),
        release=ReleaseRecipe(repo_id="cognica/small-poe", every=1000),
    )
    billion = {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
    }
    recipes = [
        tiny,
        deep,
        small,
        Recipe(
            name="1.3b",
            model=ModelRecipe(**billion, num_key_value_heads=12, poe_stage_layers=(6, 6, 6, 6), per_stage_head=False),
            training=TrainingRecipe(steps=26_430, batch_rows=512),
            release=ReleaseRecipe(repo_id="cognica/poe-1.3b"),
        ),
        Recipe(
            name="1.5b",
            model=ModelRecipe(vocab_size=48_000, **billion, num_key_value_heads=6, poe_stage_layers=(12, 5, 4, 3)),
            training=TrainingRecipe(steps=40_000),
            release=ReleaseRecipe(repo_id="cognica/poe-1.5b"),
        ),
        Recipe(name="3b", release=ReleaseRecipe(repo_id="cognica/poe-3b")),
    ]
    return {r.name: r for recipe in recipes for r in (recipe, _backprop_arm(recipe))}


RECIPES = _named()


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or from a ``recipe.json``.

    Raises:
        UserError: neither a known name (the nearest one is suggested) nor a readable recipe file.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.is_dir():
        path = path / "recipe.json"
    if path.suffix == ".json":
        return recipe_from_dict(read_json(path, "recipe"), str(path))
    near = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown recipe {name!r}: {hint}recipes are {', '.join(RECIPES)}, or a path to a recipe.json")


def recipe_from_dict(values: dict[str, Any], where: str) -> Recipe:
    """Build a recipe from JSON values. Raises UserError naming each unknown, missing or mistyped field."""
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(values), strict=True, extra="forbid")
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg'].lower()}" for e in error.errors()]
        raise UserError(f"recipe {where}: {'; '.join(problems)}") from error
