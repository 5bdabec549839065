"""The analysis record of one checkpoint: schema and files.

``analysis/step-N.json`` holds what a report or card prints of one step; ``analysis/step-N.documents.npz`` beside it the
sums (``sums.py``) from which ``changes.py`` computes paired changes between any two records. NaN and infinity,
unknown fields and contradictions between fields are refused on writing and on reading. A record names what was
measured, carries the sha256 of its own content and that of the sums: a changed byte is named by whoever reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sized
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from cognica_poe.analysis.sums import Sums, pack, unpack
from cognica_poe.errors import UserError
from cognica_poe.files import write_bytes, write_json
from cognica_poe.seals import SEAL, read_sealed, require_sha256, sealed

SCHEMA_VERSION: Literal[1] = 1
_REMEDY = "restore it or make the record again with `cognica-poe analyze`"
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Bits = Annotated[float, Field(ge=0.0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class ModelFacts(_Part):
    """Which weights were measured."""

    name: str
    parameters: Count
    poe_mode: Literal["none", "flat", "hier", "residual_logop"]
    stage_layers: Annotated[list[int], Field(min_length=1)]
    weights_sha256: Sha256
    """sha256 over names and bytes of the parameters, sorted by name."""


class MadeFrom(_Part):
    """What the weights were trained from, and on what they were measured."""

    recipe: Sha256
    """Of the settings that a resumed run may not change."""
    data: Sha256
    """Of the sha256 of all shards."""
    tokenizer: Sha256
    """Of tokenizer.json."""


class BitsPerByte(_Part):
    """Bits per UTF-8 byte (special tokens stand for no byte)."""

    full: Bits
    """The path that was trained."""
    stage: list[Bits]
    prefix: list[Bits]
    """Pool of the stages 0..k."""
    plain: Bits
    mean_stage: Bits
    """Mean of ``stage``: the mean cross-entropy of the stages, which the pool is below (or equal)."""


class Accuracy(_Part):
    """Share of targets that are the top-1 token."""

    full: Share
    stage: list[Share]
    prefix: list[Share]
    plain: Share


class Difference(_Part):
    """A difference and its 95 % paired bootstrap interval over documents."""

    value: float
    low: float
    high: float


class Gaps(_Part):
    """BPB of the trained path minus that of another use of the same weights: below zero the trained path is better."""

    stage: list[Difference]
    """Against one head alone, by stage; the last is the crossover gap of the model card."""
    prefix: list[Difference]
    """Against the pool of the stages 0..k, k < K - 1."""


class Intervals(_Part):
    """95 % bootstrap intervals [low, high] over documents."""

    full: Bounds
    stage: list[Bounds]
    prefix: list[Bounds]
    plain: Bounds


class Wand(_Part):
    """Early exit at ``safety``, teacher-forced, cross-fitted over halves of the documents."""

    safety: Annotated[float, Field(ge=0.0)]
    positions: Count
    exit_fraction: list[Share]
    agreement: Share


class Speculative(_Part):
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


class Routing(_Part):
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


class Heads(_Part):
    """Geometry of the stage heads, from the weights alone; null where a head is zero."""

    norm: list[Annotated[float, Field(ge=0.0)]]
    alignment: list[list[Annotated[float, Field(ge=-1.0, le=1.0)] | None]]
    """Signed cosine of the dominant singular vectors of two stage heads."""
    unique_share: list[Share | None]
    """Squared norm of a head outside the span of the heads before it."""
    top_tokens: list[list[str]]
    """Tokens of the dominant singular vector."""
    perturbations: list[HeadPerturbation] | None = None


class HeadPerturbation(_Part):
    """Change of the full BPB with one stage head, or all (null), scaled by beta; paired 95 % interval."""

    stage: Count | None
    beta: float
    value: float
    low: float
    high: float


class Baseline(_Part):
    """What a general compressor reaches on the same text."""

    xz_bpb: Bits
    xz_primed_bpb: Bits | None
    """After the training text."""
    val_bytes: Count | None = None
    train_bytes: Count | None = None
    train_truncated: bool | None = None
    method: str | None = None


class Speed(_Part):
    """Time of plain cached decoding over that of another mode, on the same prompts in turn; 95 % interval over them."""

    mode: str
    ratio: Annotated[float, Field(gt=0.0)]
    low: Annotated[float, Field(gt=0.0)]
    high: Annotated[float, Field(gt=0.0)]
    prompts: Count
    new_tokens: Count
    dtype: str
    device: str


class Validation(_Part):
    """The text that everything was measured on, and how."""

    documents: Count
    bytes: Count
    tokens: Count
    sha256: Sha256
    window: Annotated[int, Field(ge=1)]
    stride: int | None = None
    unit: Literal["document", "piece"] = "document"
    """What the bootstrap resamples; pieces, where the slice has too few documents."""
    sampled: bool = False
    """Whether the slice is a sample of the validation split (``val_max_bytes``), not all of it."""


class Probe(_Part):
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


class AnalysisRecord(_Part):
    """All measurements of one checkpoint."""

    schema_version: Literal[1] = SCHEMA_VERSION
    step: Count
    tokens_seen: Count
    model: ModelFacts
    path: Literal["pool", "plain"]
    """Which path was trained, and which "full" means."""
    bpb: BitsPerByte
    accuracy: Accuracy
    gaps: Gaps
    intervals: Intervals
    accuracy_intervals: Intervals
    wand_bounds: list[Annotated[float, Field(ge=0.0)]]
    wand: Wand
    speculative: Speculative
    routing: Routing | None = None
    heads: Heads | None = None
    speeds: list[Speed] = Field(default_factory=list)
    """Timed where it was asked for: times differ from run to run."""
    baseline: Baseline | None
    validation: Validation
    probes: list[Probe]
    seconds: Annotated[float, Field(ge=0.0)]
    versions: dict[str, str]
    made_from: MadeFrom | None = None
    documents_sha256: Sha256 | None = None
    """Of the file of sums per document and prompt."""
    sha256: Sha256 | None = None
    """Of the content of this record, the key itself left out; null until it is written."""
    _sums: Sums | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> AnalysisRecord:
        stages = len(self.model.stage_layers) if self.path == "pool" else 1
        lengths: dict[str, tuple[Sized, int]] = {
            "bpb.stage": (self.bpb.stage, stages),
            "bpb.prefix": (self.bpb.prefix, stages),
            "accuracy.stage": (self.accuracy.stage, stages),
            "accuracy.prefix": (self.accuracy.prefix, stages),
            "gaps.stage": (self.gaps.stage, stages),
            "gaps.prefix": (self.gaps.prefix, stages - 1),
            "intervals.stage": (self.intervals.stage, stages),
            "intervals.prefix": (self.intervals.prefix, stages),
            "wand_bounds": (self.wand_bounds, stages - 1),
            "wand.exit_fraction": (self.wand.exit_fraction, stages),
        }
        for name, (values, length) in lengths.items():
            if len(values) != length:
                raise ValueError(f"{name} has {len(values)} entries, the path has {length}")
        _require((self.path == "plain") == (self.model.poe_mode == "none"), "path and poe_mode disagree")
        _require(math.isclose(sum(self.wand.exit_fraction), 1.0, abs_tol=1e-6), "wand.exit_fraction does not sum to 1")
        others = [*self.bpb.stage, *self.bpb.prefix[:-1]]
        for gap, other in zip([*self.gaps.stage, *self.gaps.prefix], others, strict=True):
            _require(math.isclose(gap.value, self.bpb.full - other, abs_tol=1e-9), "gaps and bpb disagree")
            _require(gap.low <= gap.high, "a gap has low above high")
        _require(self.speculative.accepted <= self.speculative.proposed, "more drafts accepted than proposed")
        for some in (self.intervals, self.accuracy_intervals):
            for low, high in [some.full, *some.stage, *some.prefix, some.plain]:
                _require(low <= high, "an interval has low above high")
        return self

    @property
    def sums(self) -> Sums | None:
        """Sums per document and prompt, if they were stored beside the record."""
        return self._sums

    def write(self, folder: Path) -> Path:
        """Write ``step-N.json`` (and ``step-N.documents.npz``) into ``folder``; returns the path of the JSON.

        Raises UserError where the disk refuses.
        """
        path = record_path(folder, self.step)
        self.documents_sha256 = None
        if self._sums is not None:  # first, so that a record never lacks the sums it was made with
            packed = pack(self._sums)
            write_bytes(sums_path(path), packed)
            self.documents_sha256 = hashlib.sha256(packed).hexdigest()
        content = sealed(self.model_dump(mode="json"))
        self.sha256 = content[SEAL]
        write_json(path, content)
        return path


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def record_path(folder: Path, step: int) -> Path:
    """Where the record of ``step`` lies."""
    return Path(folder) / f"step-{step}.json"


def sums_path(path: Path) -> Path:
    """Where the sums of the record at ``path`` lie."""
    return path.with_suffix(".documents.npz")


def read_sums(path: Path, documents_sha256: str | None) -> Sums | None:
    """The sums beside the record at ``path``, None if there are none. Raises UserError where they are not its own."""
    file = sums_path(path)
    if not file.is_file():
        return None
    require_sha256(file, documents_sha256 or "that of no sums", "per-document sums", _REMEDY)
    return unpack(file, str(file), _REMEDY)


def read_record(path: Path) -> AnalysisRecord:
    """Read and check a record, with its sums where they lie beside it.

    Raises UserError naming the file and the first fault.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"analysis record not found: {path}; make it with `cognica-poe analyze`")
    content = sealed(read_sealed(path, "analysis record", _REMEDY))
    try:
        record = AnalysisRecord.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the record"
        message = f"analysis record {path} is not valid: {where}: {first['msg']}; {_REMEDY}"
        raise UserError(" ".join(message.split())) from error
    record._sums = read_sums(path, record.documents_sha256)
    return record


def load_records(folder: Path) -> list[AnalysisRecord]:
    """All records of a run's ``analysis`` folder, by step; an absent folder has none. Raises as ``read_record``."""
    paths = Path(folder).glob("step-*.json")
    return sorted((read_record(path) for path in paths), key=lambda record: record.step)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a record."""
    schema = AnalysisRecord.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
