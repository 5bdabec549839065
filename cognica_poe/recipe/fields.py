"""Every value that decides a run, as frozen dataclasses: a recipe. Each field is an option of the command line.

A field's metadata say what it may be and whether a resumed run may change it (:func:`setting`); ``rules`` reads them.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal

LOG_STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LONGEST_CONTEXT = 2**20
"""Tokens of a context, far beyond what any recipe here has."""


@dataclass(frozen=True)
class Range:
    """What a number may be: finite, of 64 bits, and within bounds. ``str()`` says it in words."""

    low: float | None = 0
    high: float | None = None
    above: bool = False
    """``low`` itself is too little."""

    def problem(self, value: Any) -> str | None:
        """What ``value``, or the first wrong one of several, is and must be; None for sound ones and no numbers."""
        if isinstance(value, tuple):
            return next(filter(None, map(self.problem, value)), None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        largest = 2**63 - 1 if isinstance(value, int) else sys.float_info.max
        low = -largest if self.low is None else self.low
        high = largest if self.high is None else self.high
        if low <= value <= high and not (self.above and value == low):  # false for NaN
            return None
        shown = str(value) if len(str(value)) <= 24 else f"{str(value)[:16]}..."
        if self.high is None and value > high:
            return f"is {shown}; that is too large"
        wanted = f"at most {self.high:,}" if value > high else str(Range(self.low, None, self.above))
        return f"is {shown}; it must be {wanted or 'a number'}"

    def __str__(self) -> str:
        if self.low is not None and self.high is not None and not self.above:
            return f"{self.low} to {self.high}"
        low = "" if self.low is None else f"{'above' if self.above else 'at least'} {self.low}"
        high = "" if self.high is None else f"at most {self.high}"
        return ", ".join(filter(None, (low, high)))


def setting(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = 0,
    high: float | None = None,
    above: bool = False,
    resume: bool = False,
    later: bool = False,
) -> Any:
    """A field with its rules.

    Args:
        default: its value where a recipe says nothing; a field without one must be given.
        low, high, above: the :class:`Range` of a number. Fields without :func:`setting` start at 0.
        resume: a resumed run may have another value.
        later: the field came when there were runs already: at its default it is no part of what tells runs apart.
    """
    rules = {"range": Range(low, high, above), "resume": resume, "absent": default if later else dataclasses.MISSING}
    return dataclasses.field(default=default, metadata=rules)


@dataclass(frozen=True)
class ModelRecipe:
    """Shape and objective; the fields carry the names of the released config."""

    vocab_size: int = setting(32768, low=266, high=2**20)
    """Tokens of the vocabulary, 9 specials included."""
    hidden_size: int = setting(2048, low=1, high=2**17)
    intermediate_size: int = setting(12800, low=1, high=2**20)
    num_hidden_layers: int = setting(32, low=1, high=1024)
    num_attention_heads: int = setting(16, low=1, high=1024)
    num_key_value_heads: int = setting(8, low=1, high=1024)
    head_dim: int = setting(128, low=1, high=2**12)
    max_position_embeddings: int = setting(2048, low=8, high=LONGEST_CONTEXT)
    """Context length in tokens; also the row length of training."""
    window_pattern: str = "SSSL"
    """S short, L long window, tiled over the layers; the last layer is always long."""
    short_window: int | None = setting(None, low=1, high=LONGEST_CONTEXT)
    """Tokens before itself that a short layer sees; a quarter of the context, rounded up to 128, when omitted."""
    poe_mode: Literal["flat", "hier", "none", "residual_logop"] = "flat"
    """flat: local losses; hier: deep supervision; none: ordinary backprop; residual_logop: local losses of the pool so
    far, in which the stages before are constants."""
    poe_alpha: float = setting(0.0, low=-10, high=10)
    """Exponent of the number of experts, in the loss and in the pool. In the loss it is a factor on every gradient, to
    which Muon and AdamW are blind: what it changes is the pool, and so the losses of residual_logop."""
    poe_stage_layers: tuple[int, ...] = setting((16, 6, 5, 5), low=1, high=1024)
    """Layers of every stage."""
    per_stage_head: bool = True
    """Every stage has a head of its own beside the shared one."""
    stage_head_rank: int = 0
    """Rank of the stages' own heads: the shared matrix plus two thin ones; 0: full matrices."""
    poe_exit_layers: tuple[int, ...] = setting((), low=1, high=1023, later=True)
    """Exits inside stages, by the layers before each: heads that draft and answer alone, no experts of the pool. What
    they learn reaches their heads alone; everything else is trained as without them."""
    exit_head_rank: int = setting(0, later=True)
    """Rank of the exits' own heads: the shared matrix plus two thin ones; 0: full matrices."""


@dataclass(frozen=True)
class CleaningRecipe:
    """Which documents are dropped before training; the manifest counts each with its reason."""

    min_chars: int = setting(0, later=True)
    """Fewest characters of a document."""
    max_chars: int | None = setting(None, low=1, later=True)
    """Most characters of a document."""
    check_language: bool = setting(False, later=True)
    """Drop what is not in the language that its source states, by script or by frequent words."""
    max_symbol_share: float = setting(1.0, high=1, later=True)
    """Most characters that are no letter, digit, mark or white space, as a share; program source is not held to it."""
    exact_duplicates: bool = setting(True, later=True)
    """Drop all but one of equal texts."""
    near_duplicates: bool = setting(False, later=True)
    """Drop all but one of texts that share most of their words in order."""
    validation_leaks: bool = setting(True, later=True)
    """Drop training documents that hold a document or a paragraph of the validation split."""
    evaluation_texts: str | None = setting(None, later=True)
    """File or folder of texts that the model is evaluated on: drop documents that hold a run of their words."""
    evaluation_words: int = setting(13, low=1, high=1000, later=True)
    """Length of such a run in words."""


@dataclass(frozen=True)
class DataRecipe:
    """Where the text comes from and how it becomes rows."""

    mix: str = "frontier_v1"
    """Name of a mix, or path of a folder or file of parquet, jsonl or text."""
    val_fraction: float = setting(0.02, high=0.5)
    """Share of the documents held out for validation."""
    val_min_bytes: int = setting(200_000, low=1)
    """Hold out at least this much text."""
    max_bytes: int | None = setting(None, low=1)
    """Stop reading after this many bytes of text."""
    case_aug_prob: float = setting(0.15, high=1)
    """Probability that a document is lower-cased (80 %) or upper-cased (20 %) in an epoch."""
    tokenizer_bytes: int = setting(60_000_000, low=1)
    """Text the tokenizer is trained on, in bytes."""
    seed: int = 0
    order: Literal["shards", "shuffled"] = setting("shards", later=True)
    """shards: those of epoch 0 come as the data folder has them, of later epochs in a seeded order; shuffled: those of
    epoch 0, too. Rows within a shard are shuffled in any case."""
    shard_bytes: int = setting(256_000_000, low=1, high=10**9, later=True)
    """UTF-8 text of a training shard, about; a shard is what is packed at a time."""
    cleaning: CleaningRecipe = dataclasses.field(default_factory=CleaningRecipe)


@dataclass(frozen=True)
class ScheduleRecipe:
    """When the learning rate rises and falls; a resumed run may change it from there on."""

    warmup_steps: int = setting(1000, resume=True)
    """Steps of linear warm-up."""
    warmdown_ratio: float = setting(0.65, high=1, resume=True)
    """Share of all steps spent in the linear warm-down."""
    final_lr_fraction: float = setting(0.05, high=1, resume=True)
    """Learning-rate multiplier at the last step."""
    momentum_start: float = setting(0.85, high=1, resume=True)
    """Muon momentum at step 0."""
    momentum_peak: float = setting(0.97, high=1, resume=True)
    """Muon momentum after its warm-up."""
    momentum_end: float = setting(0.90, high=1, resume=True)
    """Muon momentum at the last step; it falls during the warm-down."""
    momentum_warmup_steps: int = setting(400, resume=True)
    """Steps of linear momentum warm-up."""


@dataclass(frozen=True)
class OptimizerRecipe:
    """Learning rates and decays, by default those of the card; a resumed run may change them from there on."""

    matrix_lr: float = setting(0.015, resume=True)
    """Muon, matrices of the blocks."""
    embedding_lr: float = setting(0.3, resume=True)
    """AdamW, token embeddings; value embeddings get half of it."""
    unembedding_lr: float = setting(0.008, resume=True)
    """AdamW, shared and stage heads."""
    scalar_lr: float = setting(0.5, resume=True)
    """AdamW, x0 lambdas; residual lambdas get a hundredth of it."""
    gate_lr: float = setting(0.2, resume=True)
    """AdamW, smear and backout."""
    weight_decay: float = setting(0.28, high=100, resume=True)
    """Muon's cautious decay; follows a cosine to 0 over the run."""
    lr_scaling: bool = setting(True, resume=True)
    """Multiply every rate by sqrt(batch tokens / 2^19), embeddings and heads also by (width / 768)^-0.5."""
    muon_beta2: float = setting(0.9, high=1, resume=True)
    """Decay of Muon's factored second moment; 1 turns the normalisation off."""
    muon_iteration: Literal["polar_express", "quintic"] = setting("polar_express", resume=True)
    """Newton-Schulz coefficients."""
    muon_dtype: Literal["float32", "bfloat16"] = setting("float32", resume=True)
    """Dtype of the Newton-Schulz products."""


@dataclass(frozen=True)
class RanksRecipe:
    """How several ranks share a training step; one rank alone needs none of it."""

    parallel: Literal["rows", "stages"] = setting("rows", resume=True)
    """rows: every rank holds the model and takes its part of the rows; stages: every rank owns stages (flat only)."""
    grad_sync: Literal["every_microbatch", "last_microbatch"] = setting("every_microbatch", resume=True)
    """every_microbatch: gradients stay sharded (ZeRO-2); last_microbatch: one exchange a step, full gradients kept."""
    replica_dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", resume=True)
    """Dtype of the weights that every rank computes with, auto: that of the products; sharded masters are fp32."""
    reduce_dtype: Literal["float32", "bfloat16"] = setting("float32", resume=True)
    """Dtype in which gradients travel and are summed across ranks."""


@dataclass(frozen=True)
class GuardRecipe:
    """When a step is left out, when a run rolls back, when ranks are compared."""

    spike_sigma: float = setting(6.0, resume=True)
    """A loss or gradient norm this many standard deviations above the mean of the window is a spike, unless the last
    ``max_in_a_row - 1`` steps were as high: that is a level; 0: no step is a spike."""
    spike_window: int = setting(128, low=1, high=1_000_000, resume=True)
    """Finite steps that mean and deviation are taken over; nothing is a spike before as many were seen."""
    max_in_a_row: int = setting(4, low=1, resume=True)
    """Roll back after this many steps in a row were left out."""
    max_in_window: int = setting(8, low=1, resume=True)
    """Roll back after this many of the last ``spike_window`` steps were left out."""
    pass_over: int = setting(4, resume=True)
    """After a roll-back also pass over this many steps before the first one that was left out."""
    max_rollbacks: int = setting(3, resume=True)
    """Roll back at most this often within ten windows; spikes are just left out then. What is not finite for
    ``max_in_a_row`` steps beyond the last roll-back stops the run."""
    compare_ranks_every: int = setting(100, resume=True)
    """Steps between comparisons of the ranks' weights; 0: never."""


@dataclass(frozen=True)
class ObjectiveRecipe:
    """How the gradients of stages meet in the trunk; what is omitted is that of ``model.poe_mode``."""

    gradient_flow: float | None = setting(None, high=1, resume=True)
    """beta, share of the deeper stages' gradient that crosses a boundary: 0 none (flat), 1 all (hier)."""
    late_gradient_flow: float | None = setting(None, high=1, resume=True)
    """Another beta for the end of the run."""
    late_from: float = setting(0.5, high=1, resume=True)
    """Share of the steps after which ``late_gradient_flow`` holds."""
    exit_weights: tuple[float, ...] = setting((), resume=True)
    """gamma, one per stage: weight of an exit's own gradient in the trunk, beside what comes from deeper stages. 0: the
    exit learns and teaches nothing. Its head always learns in full. 1 for every stage when omitted."""
    gradient_delay: int = setting(0, high=1)
    """tau, steps between the weights that a gradient was taken at and those that it is applied to: 1 is what stages on
    ranks of their own need to run without waiting, though gradients cross."""
    error_feedback: bool = False
    """Correct a delayed update by what the one before it lacked."""

    def flow(self, poe_mode: str, progress: float) -> float:
        """beta at ``progress``, the share of the steps that is done."""
        if self.late_gradient_flow is not None and progress >= self.late_from:
            return self.late_gradient_flow
        if self.gradient_flow is not None:
            return self.gradient_flow
        return 0.0 if poe_mode in ("flat", "residual_logop") else 1.0


@dataclass(frozen=True)
class TrainingRecipe:
    """One optimiser run."""

    steps: int = setting(83_923, low=1, high=1_000_000_000, resume=True)
    batch_rows: int = setting(384, low=1, high=2**24)
    """Rows of one optimiser step over all ranks."""
    micro_rows: int = setting(8, low=1, high=2**24, resume=True)
    """Rows of one forward and backward pass on one rank."""
    seed: int = 0
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto measures which of the two the processor multiplies faster; weights stay fp32."""
    compile: Literal["auto", "on", "off"] = setting("auto", resume=True)
    """torch.compile of each block; auto: on for CUDA, off elsewhere."""
    attention: Literal["auto", "sdpa", "flex_attention"] = setting("auto", resume=True)
    """flex_attention skips what a sliding window hides and trains on CUDA alone, sdpa masks it; auto: flex_attention on
    CUDA from capability 8.0 on, sdpa elsewhere."""
    recompute: Literal["off", "layers", "stages"] = setting("off", resume=True)
    """layers: keep only the states between layers and compute the rest again in the backward: less memory, 1/3 more
    work; stages: keep those between stages, where gradients cross them: the activations of one stage at a time."""
    checkpoint_every: int = setting(1000, low=1, resume=True)
    """Steps between checkpoints."""
    keep_checkpoints: int = setting(3, low=1, resume=True)
    """Rolling checkpoints kept; released steps are kept as well."""
    eval_every: int | None = setting(None, resume=True, later=True)
    """Steps between validations in training; 0: none. When omitted as often as takes less than 2 % of the time."""
    eval_max_bytes: int | None = setting(None, low=1, resume=True, later=True)
    """Validate in training on this much held-out text; when omitted as much as four validations have time for."""
    objective: ObjectiveRecipe = dataclasses.field(default_factory=ObjectiveRecipe)
    schedule: ScheduleRecipe = dataclasses.field(default_factory=ScheduleRecipe)
    optimizer: OptimizerRecipe = dataclasses.field(default_factory=OptimizerRecipe)
    ranks: RanksRecipe = dataclasses.field(default_factory=RanksRecipe)
    guard: GuardRecipe = dataclasses.field(default_factory=GuardRecipe)


@dataclass(frozen=True)
class ReleaseRecipe:
    """Which steps are measured and published."""

    repo_id: str = setting("cognica/poe", resume=True)
    """Name of the repository, org/name."""
    every: int = setting(2000, low=1, resume=True)
    """Release every this many steps, and the last one."""
    log_steps: bool = setting(True, resume=True)
    """Also release steps 0, 1, 2, 4 ... 512."""
    val_max_bytes: int | None = setting(None, low=1, resume=True)
    """Measure on this much validation text; all of it when omitted."""
    wand_safety: float = setting(1.0, high=1_000_000, resume=True)
    """Factor on the WAND bounds when early exits are measured."""
    k_draft: int = setting(4, low=1, high=1024, resume=True)
    """Drafted tokens per round when speculative acceptance is measured."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    name: str = setting(resume=True)
    model: ModelRecipe = dataclasses.field(default_factory=ModelRecipe)
    data: DataRecipe = dataclasses.field(default_factory=DataRecipe)
    training: TrainingRecipe = dataclasses.field(default_factory=TrainingRecipe)
    release: ReleaseRecipe = dataclasses.field(default_factory=ReleaseRecipe)

    def released_steps(self) -> list[int]:
        """Steps to release, in order; the last step is always one."""
        steps = self.training.steps
        chosen = set(range(self.release.every, steps, self.release.every)) | {steps}
        if self.release.log_steps:
            chosen |= {step for step in LOG_STEPS if step <= steps}
        return sorted(chosen)
