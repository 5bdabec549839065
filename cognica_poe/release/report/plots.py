"""The plots of the report: what is drawn from metrics and records, and the sentence under each."""

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
        _loss, _bpb, _distance, _accuracy, _gap, _bounds, _exits, _acceptance, _throughput, _rate,
    ]  # fmt: skip
    return [plot for index, make in enumerate(makers) if (plot := make(run, f"{prefix}{index}"))]


def comparison_plots(runs: Sequence[RunFolder]) -> list[Plot]:
    """Runs beside each other, each on its own trained path."""
    return [
        _compare(runs, "cmp0", "Bits per byte on each run's trained path", "bits per byte", _trained_bpb, True),
        _compare(runs, "cmp1", "Next-token accuracy, trained path", "accuracy (%)", _trained_accuracy, False),
        _compare(runs, "cmp2", "Throughput", "tokens per second", _speed, False),
    ]


def _trained_bpb(run: RunFolder) -> tuple[list[float], list[float]]:
    return series(run.records, "bpb", "full")


def _trained_accuracy(run: RunFolder) -> tuple[list[float], list[float]]:
    xs, ys = series(run.records, "accuracy", "full")
    return xs, [100 * y for y in ys]


def _speed(run: RunFolder) -> tuple[list[float], list[float]]:
    xs, ys = series(run.metrics, "tokens_per_second")
    return drawing.thin(xs, drawing.smooth(ys))


def _compare(
    runs: Sequence[RunFolder],
    name: str,
    title: str,
    unit: str,
    take: Callable[[RunFolder], tuple[list[float], list[float]]],
    logarithmic: bool,
) -> Plot:
    lines: list[drawing.Line] = []
    for index, run in enumerate(runs):
        xs, ys = take(run)
        lines.append((run.name, xs, ys, {"color": drawing.RUN_COLOURS[index % len(drawing.RUN_COLOURS)]}))

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, lines)
        drawing.step_axis(axes)
        if logarithmic:
            drawing.wide_range(axes, [y for _, _, ys, _ in lines for y in ys])
        elif unit.startswith("tokens"):
            _from_zero(axes, [y for _, _, ys, _ in lines for y in ys])

    svg = drawing.svg(name, draw, x="optimiser step", y=unit, label=title)
    return Plot(title, svg, "One line per run.")


def _colour(stage: int) -> str:
    return drawing.STAGE_COLOURS[stage % len(drawing.STAGE_COLOURS)]


def _stages(run: RunFolder) -> range:
    """The stages to draw: none where one path is all there is."""
    return range(stage_count(run.latest)) if is_pool(run.latest) else range(0)


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    axes.set_ylim(0, 1.12 * max(values, default=1.0) or 1.0)


def _loss(run: RunFolder, name: str) -> Plot | None:
    width = max((len(row["loss_stages"]) for row in run.metrics if isinstance(row.get("loss_stages"), list)), default=0)
    if width:
        lines = [(f"stage {k}", series(run.metrics, "loss_stages", k), _colour(k)) for k in range(width)]
    else:
        lines = [("loss", series(run.metrics, "loss"), _colour(0))]
    if not any(xs for _, (xs, _), _ in lines):
        return None

    def draw(axes: Axes) -> None:
        for label, (xs, ys), colour in lines:
            axes.plot(*drawing.thin(xs, ys), color=colour, linewidth=0.6, alpha=0.25)
            axes.plot(*drawing.thin(xs, drawing.smooth(ys)), color=colour, linewidth=1.4, label=label)
        drawing.step_axis(axes)

    svg = drawing.svg(
        name, draw, x="optimiser step", y="training loss (nats per token)", label="Training loss", legend=4
    )
    return Plot("Training loss by stage", svg, "Faint: every step. Strong: moving average over about 3 % of the run.")


def _bpb(run: RunFolder, name: str) -> Plot:
    full = series(run.records, "bpb", "full")
    stages = [series(run.records, "bpb", "stage", k) for k in _stages(run)]
    plain = series(run.records, "bpb", "plain") if stages else ([], [])
    baseline = run.latest.get("baseline") or {}

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, [(f"stage {k}", *xy, {"color": _colour(k)}) for k, xy in enumerate(stages)])
        style = {"color": drawing.INK, "linewidth": 2.0, "markersize": 4}
        drawing.draw_lines(axes, [(trained_path(run.latest), *full, style)])
        drawing.draw_lines(axes, [("plain path", *plain, {"color": drawing.PLAIN})] if plain[0] else [])
        _interval(axes, run.records, ("intervals", "full"), drawing.INK)
        drawing.horizontal(axes, baseline.get("xz_bpb"), "xz", ":")
        drawing.horizontal(axes, baseline.get("xz_primed_bpb"), "primed xz", "--")
        values = [y for _, ys in (full, plain, *stages) for y in ys]
        drawing.wide_range(axes, [*values, *(v for v in baseline.values() if isinstance(v, float))])
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="bits per UTF-8 byte", label="Bits per byte by path")
    note = "Held-out text; lower is better. Shaded: 95 % interval of the trained path. xz: general-purpose compressor."
    return Plot("Bits per byte by path", svg, note)


def _interval(axes: Axes, records: Sequence[Mapping[str, Any]], path: tuple[str, str], colour: str) -> None:
    xs, lows = series(records, *path, 0)
    other, highs = series(records, *path, 1)
    if xs and xs == other:
        drawing.band(axes, xs, lows, highs, colour)


def _distance(run: RunFolder, name: str) -> Plot | None:
    rows = []
    for record in run.records:
        full, prefix = record["bpb"].get("full"), record["bpb"].get("prefix") or []
        if full is None:
            continue
        shift = {"stage": [1000 * (v - full) for v in record["bpb"]["stage"]],
                 "prefix": [1000 * (v - full) for v in prefix]}  # fmt: skip
        rows.append({"step": record["step"], **shift})
    count = stage_count(run.latest)
    if count < 2 or not rows:
        return None
    lines: list[drawing.Line] = [(f"stage {k}", *series(rows, "stage", k), {"color": _colour(k)}) for k in range(count)]
    for k in range(1, count - 1):
        lines.append((f"first {k + 1}", *series(rows, "prefix", k), {"color": _colour(k), "linestyle": (0, (2, 1.2))}))

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=drawing.INK, linewidth=1.0)
        drawing.draw_lines(axes, lines)
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="above full pool (milli-bits per byte)",
                     label="Distance of stages and prefixes from the full pool")  # fmt: skip
    note = (
        "What one head alone (solid) or the pool of the first stages (dashed) loses against all stages; zero is equal."
    )
    return Plot("Stages and prefixes against the full pool", svg, note)


def _accuracy(run: RunFolder, name: str) -> Plot | None:
    if not series(run.records, "accuracy", "full")[0]:
        return None
    lines: list[drawing.Line] = []
    for k in _stages(run):
        lines.append((f"stage {k}", *series(run.records, "accuracy", "stage", k), {"color": _colour(k)}))
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
                [step for step, _ in found], values, yerr=[down, up], color=_colour(number), marker="o", markersize=3.5,
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
        (f"stage {k} to {k + 1}", *series(run.records, "wand_bounds", k), {"color": _colour(k)}) for k in range(width)
    ]

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, lines)
        _from_zero(axes, [y for _, _, ys, _ in lines for y in ys])
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
            axes.bar(places, parts, bottom=floor, width=0.8, color=_colour(k), label=f"stage {k}")
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
        drawing.draw_lines(axes, [("acceptance", xs, [100 * y for y in ys], {"color": _colour(0)})])
        lows, highs = (series(run.records, "speculative", side) for side in ("low", "high"))
        if xs == lows[0] == highs[0]:
            drawing.band(axes, xs, [100 * y for y in lows[1]], [100 * y for y in highs[1]], _colour(0))
        axes.set_ylim(0, 103)
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="accepted drafts (%)", label="Acceptance", legend=0)
    proposed = dig(run.latest, "speculative", "proposed")
    note = "Self-speculative decoding, accepted over proposed tokens" + (
        f" ({proposed:,} at the last step)." if proposed else "."
    )
    return Plot("Speculative acceptance", svg, note)


def _throughput(run: RunFolder, name: str) -> Plot | None:
    xs, ys = _speed(run)
    if not xs:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(xs, ys, color=_colour(0), linewidth=1.4)
        _from_zero(axes, ys)
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="tokens per second", label="Throughput", legend=0)
    return Plot("Training throughput", svg, "Moving average.")


def _rate(run: RunFolder, name: str) -> Plot | None:
    xs, ys = series(run.metrics, "lr_scale")
    if not xs:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*drawing.thin(xs, ys), color=_colour(0), linewidth=1.4)
        _from_zero(axes, ys)
        drawing.step_axis(axes)

    svg = drawing.svg(name, draw, x="optimiser step", y="learning-rate scale", label="Learning-rate scale", legend=0)
    return Plot("Learning-rate schedule", svg, "Warm-up, constant, warm-down: factor on every group's rate.")
