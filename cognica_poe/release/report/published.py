"""A published trajectory in the report: its own section, and curves beside those of runs, by share of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cognica_poe.release.published import (
    FIGURES,
    Published,
    Step,
    readings,
    share_interval,
    size_of,
    steps_of,
    value_of,
)
from cognica_poe.release.report import drawing, page
from cognica_poe.release.report.plots import Plot, dig
from cognica_poe.release.report.run_folder import RunFolder
from cognica_poe.release.text import MISSING, count, html_text, interval, number, percent, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float, float | None, float | None]]
"""``(x, value, low, high)``."""


def published_section(published: Published, prefix: str) -> str:
    """Plots, readings, and the table of a published trajectory, HTML."""
    sizes = ", ".join(f"{name} {value:,}" for name, value in vars(published.sizes).items() if value)
    said = (
        f"<p>Imported from {html_text(published.source)} (sha256 {html_text(published.source_sha256[:12])}). Partial "
        "records: what the table does not hold is missing. Intervals are those that the stated sample sizes imply "
        f"({html_text(sizes) or 'none was stated'}), binomial and unpaired; a figure without one has none.</p>"
    )
    lines = page.listing([html_text(line, 1000) for line in readings(published)])
    return "\n".join(
        part
        for part in (
            said,
            page.subsection("Curves", page.plots(_plots(published, prefix)), f"{prefix}curves"),
            page.subsection("Which changes are noise", lines, f"{prefix}noise") if lines else "",
            _table(published, prefix),
        )
        if part
    )


def _table(published: Published, prefix: str) -> str:
    width = max((len(row["wand_bounds"] or []) for row in published.rows), default=0)
    changes = {key: {step.step: step for step in steps_of(published, key)} for key, _ in FIGURES}
    header = ["step", "in training", "bits per byte"]
    for _, words in FIGURES:
        header += [words, "95 % interval", "change"]
    header += [*(f"bound {k} to {k + 1}" for k in range(width)), "speed-up"]
    rows = []
    for row in published.rows:
        cells = [count(row["step"]), number(row["validation_bpb"], 3), number(row["bpb"])]
        for key, _ in FIGURES:
            cells += _share(published, key, row[key], changes[key].get(row["step"]))
        cells += [number(value_of(row, "wand_bounds", k)) for k in range(width)]
        rows.append([*cells, MISSING if row["speed_up"] is None else f"{number(row['speed_up'], 2)}x"])
    return page.table(header, rows, "Published checkpoints", text_columns=0, anchor=f"{prefix}table")


def _share(published: Published, key: str, share: float | None, step: Step | None) -> list[str]:
    size = size_of(published, key)
    bounds = MISSING if share is None or not size else interval(share_interval(share, size), 3)
    if step is None:
        return [percent(share, 2), bounds, MISSING]
    kind = "noise" if step.noise or not step.survives else "signal"
    change = f'{signed(100 * step.value, 2)} <span class="{kind}">{kind}</span>'
    return [percent(share, 2), bounds, change]


def _plots(published: Published, prefix: str) -> list[Plot]:
    width = max((len(row["wand_bounds"] or []) for row in published.rows), default=0)
    drafts = _points(published, "acceptance", scale=100)
    wanted = [
        ("Bits per byte", "bits per byte", [("slice", _points(published, "bpb")),
                                            ("in training", _points(published, "validation_bpb"))]),
        ("Speculative acceptance", "accepted drafts (%)", [("acceptance", drafts)]),
        ("Accuracy", "next-token top-1 (%)", [("full", _points(published, "accuracy", scale=100))]),
        ("Routed share", "routed to stage 0 (%)", [("routed", _points(published, "routed", scale=100))]),
        ("WAND bounds", "p99 bound (nats)",
         [(f"stage {k} to {k + 1}", _points(published, "wand_bounds", k)) for k in range(width)]),
    ]  # fmt: skip
    found = []
    for place, (title, unit, lines) in enumerate(wanted):
        if any(points for _, points in lines):
            svg = _draw(f"{prefix}p{place}", lines, "optimiser step", unit, title)
            found.append(Plot(title, svg, "Shaded, where a sample size is stated: the 95 % interval that it implies."))
    return found


def _points(published: Published, key: str, stage: int | None = None, scale: float = 1.0) -> Points:
    size, found = size_of(published, key), []
    for row in published.rows:
        value = value_of(row, key, stage)
        if value is not None:
            low, high = share_interval(value, size) if size else (None, None)
            edges = (None, None) if low is None or high is None else (scale * low, scale * high)
            found.append((row["step"], scale * value, *edges))
    return found


def _draw(name: str, lines: Sequence[tuple[str, Points]], x: str, unit: str, title: str) -> str:
    def draw(axes: Axes) -> None:
        for place, (label, points) in enumerate(lines):
            colour = drawing.RUN_COLOURS[place % len(drawing.RUN_COLOURS)]
            drawing.draw_lines(axes, [(label, [p[0] for p in points], [p[1] for p in points], {"color": colour})])
            drawing.band(axes, [(a, c, d) for a, _, c, d in points if c is not None and d is not None], colour)
        edges = [edge for _, points in lines for point in points for edge in point[1:] if edge is not None]
        drawing.wide_range(axes, edges)
        drawing.step_axis(axes)

    columns = 0 if len(lines) == 1 else 1 if max(len(label) for label, _ in lines) > 18 else 3
    return drawing.svg(name, draw, x=x, y=unit, label=title, legend=columns)


def beside(runs: Sequence[RunFolder], names: Sequence[str], published: Sequence[Published]) -> str:
    """Runs and published trajectories in the same plots, by share of their training, HTML."""

    def of_run(run: RunFolder, take: Callable[[dict], tuple[float | None, float | None, float | None]]) -> Points:
        last = dig(run.recipe, "training", "steps") or run.latest["step"]
        rows = [(100 * record["step"] / last, *take(record)) for record in run.records if last]
        return [(x, value, low, high) for x, value, low, high in rows if value is not None]

    def of_published(item: Published, key: str, scale: float) -> Points:
        return [(100 * x / item.last, *rest) for x, *rest in _points(item, key, scale=scale)] if item.last else []  # type: ignore[misc]  # of three

    def bpb(record: dict) -> tuple[float | None, float | None, float | None]:
        low, high = dig(record, "intervals", "full") or (None, None)
        return record["bpb"]["full"], low, high

    def drafts(record: dict) -> tuple[float | None, float | None, float | None]:
        found = [dig(record, "speculative", key) for key in ("acceptance", "low", "high")]
        first, low, high = (None if value is None else 100 * value for value in found)
        return first, low, high

    plots = []
    for key, scale, unit, title, take in (
        ("bpb", 1.0, "bits per byte", "Bits per byte by share of training", bpb),
        ("acceptance", 100.0, "accepted drafts (%)", "Acceptance by share of training", drafts),
    ):
        lines = [(name, of_run(run, take)) for run, name in zip(runs, names, strict=True)]
        lines += [(item.name, of_published(item, key, scale)) for item in published]
        if sum(bool(points) for _, points in lines) > 1:
            svg = _draw(f"beside-{key}", [line for line in lines if line[1]], "share of training (%)", unit, title)
            note = "Each on its own text and protocol: levels are not comparable, courses are. Shaded: 95 % intervals."
            plots.append(Plot(title, svg, note))
    return page.plots(plots) if plots else ""
