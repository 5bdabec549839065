"""The parts of an analysis record: what each measurement stores, with its unit and range."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Bits = Annotated[float, Field(ge=0.0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelFacts(Part):
    """Which weights were measured."""

    name: str
    parameters: Count
    poe_mode: Literal["none", "flat", "hier", "residual_logop"]
    stage_layers: Annotated[list[int], Field(min_length=1)]
    weights_sha256: Sha256
    """sha256 over names and bytes of the parameters, sorted by name."""


class MadeFrom(Part):
    """What the weights were trained from, and on what they were measured."""

    recipe: Sha256
    """Of the settings that a resumed run may not change."""
    data: Sha256
    """Of the sha256 of all shards."""
    tokenizer: Sha256
    """Of tokenizer.json."""


class BitsPerByte(Part):
    """Bits per UTF-8 byte (special tokens stand for no byte)."""

    full: Bits
    """The path that was trained."""
    stage: list[Bits]
    prefix: list[Bits]
    """Pool of the stages 0..k."""
    plain: Bits
    mean_stage: Bits
    """Mean of ``stage``: the mean cross-entropy of the stages, which the pool is below (or equal)."""


class Accuracy(Part):
    """Share of targets that are the top-1 token."""

    full: Share
    stage: list[Share]
    prefix: list[Share]
    plain: Share


class Difference(Part):
    """A difference and its 95 % paired bootstrap interval over documents."""

    value: float
    low: float
    high: float


class Gaps(Part):
    """BPB of the trained path minus that of another use of the same weights: below zero the trained path is better."""

    stage: list[Difference]
    """Against one head alone, by stage; the last is the crossover gap of the model card."""
    prefix: list[Difference]
    """Against the pool of the stages 0..k, k < K - 1."""


class Intervals(Part):
    """95 % bootstrap intervals [low, high] over documents."""

    full: Bounds
    stage: list[Bounds]
    prefix: list[Bounds]
    plain: Bounds


class Wand(Part):
    """Early exit at ``safety``, teacher-forced, cross-fitted over halves of the documents."""

    safety: Annotated[float, Field(ge=0.0)]
    positions: Count
    exit_fraction: list[Share]
    agreement: Share


class ExitRule(Part):
    """Early exit by margins, teacher-forced, the last three tested on documents that did not calibrate; all null where
    the text is too little to show the stated agreement."""

    stated: Share | None
    """Agreement that the margins were calibrated for; null for the direct p99 bound."""
    margins: list[Annotated[float, Field(ge=0.0)]] | None
    """Nats between the first two tokens above which one leaves, by stage but the last."""
    exit_fraction: list[Share] | None
    agreement: Share | None
    low: Share | None
    """One-sided 95 % lower limit of ``agreement``, over documents."""


class Speculative(Part):
    """Greedy self-speculative decoding; acceptance is null where nothing was proposed."""

    acceptance: Share | None
    proposed: Count
    accepted: Count
    rounds: Count
    draft_stage: Count
    k_draft: Annotated[int, Field(ge=1)]
    prompts: Count
    low: Share | None = None
    high: Share | None = None
    new_tokens: Count | None = None


class DraftLength(Part):
    """Greedy drafts of one length over all prompts."""

    k_draft: Annotated[int, Field(ge=1)]
    proposed: Count
    accepted: Count
    rounds: Count
    acceptance: Share
    low: Share | None
    high: Share | None
    tokens_per_round: Annotated[float, Field(ge=1.0)]
    """New tokens for each pass of the full pool."""


class Drafts(Part):
    """Acceptance by draft length behind places anywhere in the held-out documents."""

    prompts: Count
    documents: Annotated[int, Field(ge=1)]
    """What the interval resamples: documents, or the files that several of them are of."""
    context: Annotated[int, Field(ge=1)]
    """Tokens before each place, BOS among them."""
    new_tokens: Annotated[int, Field(ge=1)]
    """Greedy tokens behind each place."""
    draft_stage: Count
    lengths: Annotated[list[DraftLength], Field(min_length=1)]
    probes: Speculative | None
    """The model card's protocol: behind the probe prompts instead; null where the context is too short."""


class RoutingPoint(Part):
    """Largest share that stage 0 may answer, from the widest margin on, within ``cap``."""

    cap: Share
    counted: Literal["lost", "net"]
    """Positions that the full pool has right and stage 0 wrong, or these less those that only stage 0 has right."""
    of: Literal["routed", "all"]
    """Per which positions they are counted."""
    fraction: Share
    low: Share | None
    high: Share | None
    threshold: float | None
    """Smallest routed margin of stage 0 (nats); null if nothing is routed."""
    tested_fraction: Share | None
    """Routed by thresholds of other documents."""
    tested_rate: float | None
    """Regressions that these gave, counted as the cap is."""


class Routing(Part):
    """Share of positions that stage 0 may answer alone, by its margin, at a capped rate of regressions."""

    cap: Share
    """Regressions (full pool right, stage 0 wrong) allowed per routed position."""
    fraction: Share
    regression_rate: Share
    threshold: float | None
    """Smallest routed stage-0 margin (nats); null if nothing is routed."""
    stage0_cost: Share
    """Cost of a position that stage 0 answers, relative to the full model."""
    projected_speedup: Annotated[float, Field(ge=1.0)]
    """``1 / (1 - (1 - stage0_cost) * fraction)``: projected, not measured."""
    positions: Count
    curve: list[RoutingPoint] = Field(default_factory=list)


class HeadGauge(Part):
    """Geometry of the stage heads in one gauge, from the weights alone; null where a head is zero."""

    norm: list[Annotated[float, Field(ge=0.0)]]
    alignment: list[list[Annotated[float, Field(ge=-1.0, le=1.0)] | None]]
    """Signed cosine of the dominant singular vectors of two stage heads."""
    unique_share: list[Share | None]
    """Squared norm of a head outside the span of the heads before it."""


class Heads(HeadGauge):
    """The stored stage heads, other gauges, and what switching heads off or scaling them does."""

    top_tokens: list[list[str]]
    """Tokens of the dominant singular vector."""
    folded: HeadGauge | None = None
    """Shared head plus stage head: what predicts."""
    centred: HeadGauge | None = None
    """Stage head less the mean of all: how the stages differ."""
    tokens: Count | None = None
    """Held-out tokens that the perturbations were measured on."""
    units: Count | None = None
    """What their intervals resample: documents, or the files that several of them are of."""
    perturbations: list[HeadPerturbation] | None = None
    recall: list[Recall] | None = None


class HeadPerturbation(Part):
    """Full BPB with one stage head, or all (null), scaled by beta, and its change; paired 95 % interval."""

    gauge: Literal["stored", "centred"] = "stored"
    """What beta scales: the stage head as stored, or what it has beyond the mean of all."""
    stage: Count | None
    beta: float
    bpb: Bits | None = None
    value: float
    low: float
    high: float


class Recall(Part):
    """How a fact is recalled with all stage heads scaled by beta."""

    prompt: str
    answer: str
    gauge: Literal["stored", "centred"]
    beta: float
    probability: Share
    """Of the whole answer."""
    rank: Annotated[int, Field(ge=1)]
    """Of its first token."""


class Baseline(Part):
    """What a general compressor reaches on the same text."""

    xz_bpb: Bits
    xz_primed_bpb: Bits | None
    """After the training text."""
    val_bytes: Count | None = None
    train_bytes: Count | None = None
    train_truncated: bool | None = None
    method: str | None = None


class Speed(Part):
    """Time of plain cached decoding over that of another mode, on the same prompts in turn; 95 % interval over them."""

    mode: str
    ratio: Annotated[float, Field(gt=0.0)]
    low: Annotated[float, Field(gt=0.0)]
    high: Annotated[float, Field(gt=0.0)]
    prompts: Count
    new_tokens: Count
    dtype: str
    device: str


class Validation(Part):
    """The text that everything was measured on, and how."""

    documents: Count
    bytes: Count
    tokens: Count
    sha256: Sha256
    window: Annotated[int, Field(ge=1)]
    stride: int | None = None
    unit: Literal["document", "piece"] = "document"
    """What the bootstrap resamples; pieces, where the slice has too few documents."""
    files: Count | None = None
    """How many files the documents were cut from, where several are of one: the bootstrap resamples files then."""
    sampled: bool = False
    """Whether the slice is a sample of the validation split (``val_max_bytes``), not all of it."""


class Probe(Part):
    """One greedy continuation."""

    prompt: str
    continuation: str
    expected: str
    correct: bool
    answer: str | None
    """The first answer that it asserts."""
    reason: Literal["loop", "choices", "echo", "no answer"] | None
    """Why it asserts none."""
    facts: dict[str, bool | None]
    """Secondary facts; null where it does not speak of them."""
