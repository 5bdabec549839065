"""Changes between the records of a trajectory: computed when a table is made, each against the record before it.

The documents (for acceptance the prompts) of both records are resampled alike: a change is paired. It is a signal
where two things agree: its own 95 % interval excludes zero, and its p-value is at most 0.05 after Holm's correction
(1979) for all comparisons of its table; else it is noise. The p-value is Student's t of the change over its bootstrap
standard error, with as many degrees of freedom as there are effective documents less one: percentiles of some thousand
resamples cannot tell the small p-values that a correction asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cognica_poe.analysis.bootstrap import Bootstrap
from cognica_poe.analysis.student import FLOOR, effective_documents, student, tail_of
from cognica_poe.analysis.sums import EDGES, Sums
from cognica_poe.analysis.wand import QUANTILE

LEVEL = 0.05


@dataclass(frozen=True)
class Change:
    """A paired change, its 95 % interval, p-value before correction, and whether it is a signal after it."""

    value: float
    low: float
    high: float
    p: float
    signal: bool = False


@dataclass(frozen=True)
class StepChanges:
    """Changes of one step since ``base``; ``figures`` by name, the part before a dot being its table. ``reason`` says
    why there is none."""

    base: int | None = None
    reason: str | None = None
    figures: Mapping[str, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class _Figure:
    """A figure of a record, its resampled values [resamples], what they are of when all documents count once, and how
    many equal documents these count for."""

    value: float
    samples: NDArray[np.float64]
    center: float
    documents: float


Figures = Mapping[int, Mapping[str, _Figure]]
"""By step, then by name: what ``figures_of`` made, for several calls of ``changes``."""


def figures_of(records: Sequence[Mapping[str, Any]], sums: Mapping[int, Sums], *, seed: int = 0) -> Figures:
    """The resampled figures of every record with sums; ``seed``: of the bootstrap."""
    return {r["step"]: _figures(r, sums[r["step"]], seed) if r["step"] in sums else {} for r in records}


def changes(
    records: Sequence[Mapping[str, Any]],
    sums: Mapping[int, Sums],
    *,
    seed: int = 0,
    base: int | None = None,
    figures: Figures | None = None,
) -> tuple[dict[int, StepChanges], dict[str, int]]:
    """Changes by step, and the number of comparisons by table.

    Args:
        records: in the JSON layout, any order; each is compared with the one of the next lower step.
        sums: by step; a record without sums, or of another slice or shape than its base, has no changes.
        seed: of the bootstrap.
        base: compare the records after this step with the one of this step instead.
        figures: of these records, where they are known already.
    """
    known = figures or figures_of(records, sums, seed=seed)
    found: dict[int, StepChanges] = {}
    before: Mapping[str, Any] | None = None
    for record in sorted(records, key=lambda record: record["step"]):
        step = record["step"]
        if before is None:
            if base is None or step == base:
                found[step], before = StepChanges(reason="first record" if base is None else "base"), record
            continue
        if reason := _apart(before, record, sums):
            found[step] = StepChanges(before["step"], reason)
        else:
            first = known[before["step"]]
            pairs = {name: (first[name], figure) for name, figure in known[step].items() if name in first}
            if not _same_drafts(before, record):
                pairs.pop("acceptance", None)
            found[step] = StepChanges(before["step"], None, {name: _change(*pair) for name, pair in pairs.items()})
        before = record if base is None else before
    return _label(found)


def between(
    one: Mapping[str, Any], other: Mapping[str, Any], of_one: Sums, of_other: Sums, *, seed: int = 0
) -> dict[str, Change]:
    """Paired differences of two runs, ``other`` minus ``one``: bits per byte and accuracy of the trained paths,
    acceptance where both drafted alike; empty unless both were measured on one slice."""
    if one["validation"]["sha256"] != other["validation"]["sha256"] or not _same_units(of_one, of_other):
        return {}
    first, second = _figures(one, of_one, seed), _figures(other, of_other, seed)
    wanted = ["bpb.full", "accuracy.full"]
    if _same_drafts(one, other):
        wanted.append("acceptance")
    return {name: _change(first[name], second[name]) for name in wanted if name in first and name in second}


def label_all(changes: Sequence[Mapping[str, Change]]) -> list[dict[str, Change]]:
    """The same differences with signals marked, Holm's correction over those of one figure."""
    labelled, _ = _label({place: StepChanges(figures=figures) for place, figures in enumerate(changes)})
    return [dict(labelled[place].figures) for place in range(len(changes))]


def _apart(before: Mapping[str, Any], record: Mapping[str, Any], sums: Mapping[int, Sums]) -> str | None:
    """Why two records cannot be paired."""
    for one in (before, record):
        if one["step"] not in sums:
            return f"step {one['step']} has no sums"
    if before["validation"]["sha256"] != record["validation"]["sha256"]:
        return "another slice"
    if len(before["bpb"]["stage"]) != len(record["bpb"]["stage"]):
        return "other stages"
    if not _same_units(sums[before["step"]], sums[record["step"]]):
        return "other units"
    return None


def _same_units(one: Sums, other: Sums) -> bool:
    first, second = (
        np.arange(len(some.documents.bytes)) if some.units is None else some.units for some in (one, other)
    )
    return np.array_equal(first, second)


def _same_drafts(before: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    keys = ("draft_stage", "k_draft", "prompts", "new_tokens")
    return all(before["speculative"].get(key) == record["speculative"].get(key) for key in keys)


def _figures(record: Mapping[str, Any], sums: Sums, seed: int) -> dict[str, _Figure]:
    documents = sums.documents
    bootstrap = Bootstrap(len(documents.bytes), units=sums.units, seed=seed)
    stages = [f"stage{k}" for k in range(documents.stages)] if documents.stages > 1 else []
    paths = ["full", *stages]
    number = bootstrap.effective(documents.bytes)
    columns = [documents.bytes, documents.targets, documents.nats["full"], *(documents.correct[path] for path in paths)]
    totals = bootstrap.totals(np.stack(columns, axis=1))
    bits = 1.0 / math.log(2)
    out = {"bpb.full": _ratio(columns[2], columns[0], totals[:, 2], totals[:, 0], number, bits)}
    for place, path in enumerate(paths, 3):
        out[f"accuracy.{path}"] = _ratio(columns[place], columns[1], totals[:, place], totals[:, 1], number)
    if sums.positions is not None:
        kept = sums.positions.margin.shape[0]
        counts = [*sums.positions.range, sums.positions.margin, sums.positions.regressions]
        padded = np.zeros((len(documents.bytes), len(counts), counts[0].shape[1]))
        padded[:kept] = np.stack(counts, axis=1)
        resampled = bootstrap.totals(padded.reshape(len(padded), -1)).reshape(-1, *padded.shape[1:])
        everything = padded.sum(0, keepdims=True)
        for k, bound in enumerate(record["wand_bounds"]):
            center = _quantiles(everything[:, k])[0]
            out[f"bounds.{k}"] = _Figure(bound, _quantiles(resampled[:, k]), center, number)
        if record.get("routing"):
            cap, value = record["routing"]["cap"], record["routing"]["fraction"]
            center = _routed(everything[:, -2], everything[:, -1], cap)[0]
            out["routing"] = _Figure(value, _routed(resampled[:, -2], resampled[:, -1], cap), center, number)
    if sums.drafts is not None and (sums.drafts[0] > 0).sum() >= 2:
        proposed, accepted = sums.drafts
        totals = Bootstrap(len(proposed), seed=seed).totals(sums.drafts.T)
        out["acceptance"] = _ratio(accepted, proposed, totals[:, 1], totals[:, 0], effective_documents(proposed))
    return out


def _ratio(
    above: NDArray[Any],
    below: NDArray[Any],
    above_totals: NDArray[Any],
    below_totals: NDArray[Any],
    documents: float,
    scale: float = 1.0,
) -> _Figure:
    value = scale * float(above.sum()) / float(below.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        return _Figure(value, scale * above_totals / below_totals, value, documents)


def _quantiles(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The bounds' quantile of binned values, counts [resamples, BINS] -> [resamples]; linear within a bin."""
    cumulative = counts.cumsum(1)
    wanted = QUANTILE * cumulative[:, -1:]
    place = (cumulative < wanted).sum(1)
    rows = np.arange(len(counts))
    place = np.minimum(place, counts.shape[1] - 1)
    inside = counts[rows, place]
    share = 1.0 - (cumulative[rows, place] - wanted[:, 0]) / np.where(inside > 0, inside, 1.0)
    edges = np.concatenate([[0.0], EDGES, [EDGES[-1] * 1.02]])
    quantiles: NDArray[np.float64] = edges[place] + np.clip(share, 0.0, 1.0) * (edges[place + 1] - edges[place])
    return quantiles


def _routed(counts: NDArray[np.float64], lost: NDArray[np.float64], cap: float) -> NDArray[np.float64]:
    """Largest share of positions, from the largest margin on, within the cap; both [resamples, BINS]."""
    routed, regressions = counts[:, ::-1].cumsum(1), lost[:, ::-1].cumsum(1)
    allowed = regressions <= cap * routed
    last = allowed.shape[1] - 1 - allowed[:, ::-1].argmax(1)
    total = np.maximum(routed[:, -1], 1.0)
    return np.where(allowed.any(1), routed[np.arange(len(routed)), last] / total, 0.0)


def _change(before: _Figure, after: _Figure) -> Change:
    value = after.value - before.value
    samples = after.samples - before.samples
    samples = samples[np.isfinite(samples)] + (value - (after.center - before.center))
    documents = min(before.documents, after.documents)
    tail = tail_of(round(documents), 1.0 - LEVEL)
    low, high = np.quantile(samples, [tail, 1.0 - tail])
    error = float(samples.std(ddof=1))
    if error <= 1e-12 * max(1.0, abs(before.value)):  # the same in every resample
        p = 1.0 if abs(value) <= 1e-12 else FLOOR
    else:
        n = max(2, round(documents))
        p = student(abs(value) / (error * math.sqrt(n / (n - 1))), n - 1)
    return Change(float(value), float(low), float(high), p)


def holm(values: Iterable[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    values = list(values)
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def _label(found: dict[int, StepChanges]) -> tuple[dict[int, StepChanges], dict[str, int]]:
    """Mark signals, corrected within each table."""
    tables: dict[str, list[tuple[int, str]]] = {}
    for step, row in found.items():
        for name in row.figures:
            tables.setdefault(name.partition(".")[0], []).append((step, name))
    signals: set[tuple[int, str]] = set()
    for places in tables.values():
        figures = [found[step].figures[name] for step, name in places]
        for place, figure, p in zip(places, figures, holm(figure.p for figure in figures), strict=True):
            if p <= LEVEL and (figure.low > 0.0 or figure.high < 0.0):
                signals.add(place)
    labelled = {
        step: StepChanges(
            row.base,
            row.reason,
            {name: Change(c.value, c.low, c.high, c.p, (step, name) in signals) for name, c in row.figures.items()},
        )
        for step, row in found.items()
    }
    return labelled, {table: len(places) for table, places in tables.items()}
