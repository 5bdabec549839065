"""The plots of the report that show records: what is drawn, and the sentence under each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cognica_poe.release.card.readings import comparisons, gap_lines
from cognica_poe.release.card.tables import is_pool, stage_count, trained_path
from cognica_poe.release.report import drawing
from cognica_poe.release.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Plot:
    """One plot of the page: its title, its SVG element, and the sentence under it."""

    title: str
    svg: str
    note: str


def series(rows: Sequence[Mapping[str, Any]], *path: str | int) -> tuple[list[float], list[float]]:
    """``(steps, values)`` at ``path`` inside each row; rows without a finite number there are left out."""
    xs, ys = [], []
    for row in rows:
        value = dig(row, *path)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            xs.append(row["step"])
            ys.append(float(value))
    return xs, ys


def dig(row: Any, *path: str | int) -> Any:
    """``row[path[0]][path[1]]...`` or None where something on the way is missing."""
    for key in path:
        if isinstance(key, str):
            row = row.get(key) if isinstance(row, Mapping) else None
        else:
            row = row[key] if isinstance(row, Sequence) and not isinstance(row, str) and key < len(row) else None
    return row


def run_plots(run: RunFolder, prefix: str) -> list[Plot]:
    """Every plot this run has data for; ``prefix`` makes the ids unique in the page."""
    makers: list[Callable[[RunFolder, str], Plot | None]] = [
        _bpb, _distance, _accuracy, _gap, _bounds, _exits, _acceptance,
    ]  # fmt: skip
    return [plot for index, make in enumerate(makers) if (plot := make(run, f"{prefix}{index}"))]


def colour(stage: int) -> str:
    """Of a stage."""
    return drawing.STAGE_COLOURS[stage % len(drawing.STAGE_COLOURS)]


def stages_of(run: RunFolder) -> range:
    """The stages to draw: none where one path is all there is."""
    return range(stage_count(run.latest)) if is_pool(run.latest) else range(0)


def from_zero(axes: Axes, values: Sequence[float]) -> None:
    """A y axis from zero to above ``values``."""
    axes.set_ylim(0, 1.12 * max(values, default=1.0) or 1.0)


def _bpb(run: RunFolder, name: str) -> Plot:
    full = series(run.records, "bpb", "full")
    stages = [series(run.records, "bpb", "stage", k) for k in stages_of(run)]
    plain = series(run.records, "bpb", "plain") if stages else ([], [])
    baseline = run.latest.get("baseline") or {}
    bars = _paired(run)
    shades = [] if bars else _interval(run.records, ("intervals", "full"))

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, [(f"stage {k}", *xy, {"color": colour(k)}) for k, xy in enumerate(stages)])
        style = {"color": drawing.INK, "linewidth": 2.0, "markersize": 4}
        drawing.draw_lines(axes, [(trained_path(run.latest), *full, style)])
        drawing.draw_lines(axes, [("plain path", *plain, {"color": drawing.PLAIN})] if plain[0] else [])
        for step, low, high in bars:
            axes.plot([step, step], [low, high], color=drawing.INK, linewidth=4.0, alpha=0.35, solid_capstyle="butt")
        drawing.band(axes, shades, drawing.INK)
        drawing.horizontal(axes, baseline.get("xz_bpb"), "xz", ":")
        drawing.horizontal(axes, baseline.get("xz_primed_bpb"), "primed xz", "--")
        values = [y for _, ys in (full, plain, *stages) for y in ys]
        values += [edge for _, *edges in (*bars, *shades) for edge in edges]
        drawing.wide_range(axes, [*values, *(v for v in baseline.values() if isinstance(v, float))])
        drawing.step_axis(axes)
        drawing.mark_steps(axes, run.marks, run.latest["step"])

    svg = drawing.svg(name, draw, x="optimiser step", y="bits per UTF-8 byte", label="Bits per byte by path")
    shown = (
        "Bars: where the trained path lies by the paired 95 % interval of its change since the record before."
        if bars
        else "Shaded: 95 % interval of the trained path alone."
    )
    note = f"Held-out text; lower is better. {shown} xz: general-purpose compressor."
    return Plot("Bits per byte by path", svg, note)


def _paired(run: RunFolder) -> list[tuple[int, float, float]]:
    """``(step, low, high)``: bits per byte of the record before plus the interval of the change since."""
    known = {record["step"]: record["bpb"]["full"] for record in run.records}
    changes = ((row.step, row.changes.base, row.changes.figures.get("bpb.full")) for row in run.trajectory.rows)
    return [(step, known[base] + change.low, known[base] + change.high)
            for step, base, change in changes if base is not None and change is not None]  # fmt: skip


def _interval(records: Sequence[Mapping[str, Any]], path: tuple[str, str]) -> list[tuple[float, float, float]]:
    xs, lows = series(records, *path, 0)
    others, highs = series(records, *path, 1)
    return list(zip(xs, lows, highs, strict=True)) if xs == others else []


def _distance(run: RunFolder, name: str) -> Plot | None:
    count = stage_count(run.latest)
    if count < 2:
        return None
    kinds: list[tuple[str, int, str, Any]] = [("stage", k, f"stage {k}", "-") for k in range(count)]
    kinds += [("prefix", k, f"first {k + 1}", (0, (2, 1.2))) for k in range(1, count - 1)]
    lines: list[tuple[drawing.Line, list[tuple[float, float, float]]]] = []
    for kind, k, label, style in kinds:
        rows, bands = [], []
        for record in run.records:
            value, full = dig(record, "bpb", kind, k), record["bpb"].get("full")
            if value is None or full is None:
                continue
            rows.append((record["step"], 1000 * (value - full)))
            if gap := dig(record, "gaps", kind, k):
                bands.append((record["step"], -1000 * gap["high"], -1000 * gap["low"]))
        xs, ys = [list(column) for column in zip(*rows, strict=True)] if rows else ([], [])
        lines.append(((label, xs, ys, {"color": colour(k), "linestyle": style}), bands))

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=drawing.INK, linewidth=1.0)
        for line, bands in lines:
            drawing.draw_lines(axes, [line])
            drawing.band(axes, bands, line[3]["color"])
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="above full pool (milli-bits per byte)",
                     label="Distance of stages and prefixes from the full pool")  # fmt: skip
    note = (
        "What one head alone (solid) or the pool of the first stages (dashed) loses against all stages; zero is equal. "
        "Shaded: paired 95 % intervals."
    )
    return Plot("Stages and prefixes against the full pool", svg, note)


def _accuracy(run: RunFolder, name: str) -> Plot | None:
    if not series(run.records, "accuracy", "full")[0]:
        return None
    lines: list[drawing.Line] = []
    for k in stages_of(run):
        lines.append((f"stage {k}", *series(run.records, "accuracy", "stage", k), {"color": colour(k)}))
    style = {"color": drawing.INK, "linewidth": 2.0}
    lines.append((trained_path(run.latest), *series(run.records, "accuracy", "full"), style))
    if lines[1:]:
        lines.append(("plain path", *series(run.records, "accuracy", "plain"), {"color": drawing.PLAIN}))
    lines = [(label, xs, [100 * y for y in ys], style) for label, xs, ys, style in lines]

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, lines)
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="next-token top-1 (%)", label="Accuracy by stage")
    return Plot("Accuracy by stage", svg, "Share of held-out tokens whose most likely prediction is right.")


def _gap(run: RunFolder, name: str) -> Plot | None:
    rows = [(record["step"], {item.role: item for item in comparisons(record)}) for record in run.records]
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    roles = list(rows[-1][1])

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=drawing.INK, linewidth=1.0)
        for number, role in enumerate(roles):
            found = [(step, items[role]) for step, items in rows if role in items]
            values = [1000 * item.value for _, item in found]
            down = [max(0.0, 1000 * (item.value - item.low)) for _, item in found]
            up = [max(0.0, 1000 * (item.high - item.value)) for _, item in found]
            axes.errorbar(
                [step for step, _ in found], values, yerr=[down, up], color=colour(number), marker="o", markersize=3.5,
                capsize=3, linewidth=1.2, label=f"minus {role}",
            )  # fmt: skip
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="gap (milli-bits per byte)", label="Gap", legend=2)
    said = "; ".join(gap_lines(run.latest))
    note = f"Full pool minus another use of the same weights, with paired 95 % intervals. At the last step, {said}."
    return Plot("The pool against its parts", svg, note)


def _bounds(run: RunFolder, name: str) -> Plot | None:
    width = len(run.latest.get("wand_bounds") or [])
    if not width:
        return None
    lines = [
        (f"stage {k} to {k + 1}", *series(run.records, "wand_bounds", k), {"color": colour(k)}) for k in range(width)
    ]

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, lines)
        from_zero(axes, [y for _, _, ys, _ in lines for y in ys])
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="p99 bound (nats)", label="WAND bounds")
    return Plot("WAND bounds", svg, "99th percentile of how far the next stage moves the pooled log-probabilities.")


def _exits(run: RunFolder, name: str) -> Plot | None:
    rows = [record for record in run.records if dig(record, "wand", "exit_fraction")]
    if not rows or stage_count(run.latest) < 2:
        return None

    def draw(axes: Axes) -> None:
        places, floor = range(len(rows)), [0.0] * len(rows)
        for k in range(stage_count(run.latest)):
            parts = [100 * (dig(row, "wand", "exit_fraction", k) or 0.0) for row in rows]
            axes.bar(places, parts, bottom=floor, width=0.8, color=colour(k), label=f"stage {k}")
            floor = [low + part for low, part in zip(floor, parts, strict=True)]
        every = -(-len(rows) // 6)
        axes.set_xticks(list(places)[::every], [f"{row['step']:,}" for row in rows][::every])
        axes.set_ylim(0, 100)

    svg = drawing.svg(name, draw, x="optimiser step", y="tokens that leave here (%)", label="WAND exits", legend=4)
    agreement = dig(run.latest, "wand", "agreement")
    note = "Where tokens stop at the measured bounds; a count, not a time."
    if isinstance(agreement, (int, float)):
        note += f" At the last step {100 * agreement:.2f} % of tokens are the full pool's."
    return Plot("WAND exit stage", svg, note)


def _acceptance(run: RunFolder, name: str) -> Plot | None:
    xs, ys = series(run.records, "speculative", "acceptance")
    if not xs or not is_pool(run.latest):
        return None

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, [("acceptance", xs, [100 * y for y in ys], {"color": colour(0)})])
        (lows, low), (highs, high) = (series(run.records, "speculative", side) for side in ("low", "high"))
        if xs == lows == highs:
            drawing.band(axes, [(x, 100 * a, 100 * b) for x, a, b in zip(xs, low, high, strict=True)], colour(0))
        axes.set_ylim(0, 103)
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="accepted drafts (%)", label="Acceptance", legend=0)
    proposed = dig(run.latest, "speculative", "proposed")
    note = "Self-speculative decoding, accepted over proposed tokens" + (
        f" ({proposed:,} at the last step)." if proposed else "."
    )
    return Plot("Speculative acceptance", svg, note)
