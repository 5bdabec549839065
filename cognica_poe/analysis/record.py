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

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from cognica_poe.analysis.record_parts import (
    Accuracy,
    Baseline,
    BitsPerByte,
    Count,
    Drafts,
    ExitRule,
    Gaps,
    Heads,
    Intervals,
    MadeFrom,
    ModelFacts,
    Part,
    Probe,
    Routing,
    Sha256,
    Speculative,
    Speed,
    Validation,
    Wand,
)
from cognica_poe.analysis.sums import Sums, pack, unpack
from cognica_poe.errors import UserError
from cognica_poe.files import write_bytes, write_json
from cognica_poe.seals import SEAL, read_sealed, require_sha256, sealed

SCHEMA_VERSION: Literal[1] = 1
_REMEDY = "restore it or make the record again with `cognica-poe analyze`"


class AnalysisRecord(Part):
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
    exit_rules: list[ExitRule] = Field(default_factory=list)
    """The direct bound, then one rule by stated agreement."""
    speculative: Speculative
    drafts: Drafts | None = None
    routing: Routing | None = None
    heads: Heads | None = None
    speeds: list[Speed] = Field(default_factory=list)
    """Timed where it was asked for: times differ from run to run."""
    baseline: Baseline | None
    validation: Validation
    probes: list[Probe]
    seconds: Annotated[float, Field(ge=0.0)] | None = None
    """How long it took, in records of earlier versions: what is measured twice has the same bytes."""
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
        for drafts in self.drafts.lengths if self.drafts else ():
            _require(drafts.accepted <= drafts.proposed, f"more drafts of {drafts.k_draft} accepted than proposed")
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
