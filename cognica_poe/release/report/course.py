"""The plots of a run's course, from its journals: loss, validation, throughput, learning rate, with what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cognica_poe.release.card.tables import trained_path
from cognica_poe.release.history import minima, share_of_time
from cognica_poe.release.report import drawing
from cognica_poe.release.report.plots import Plot, colour, from_zero, series
from cognica_poe.release.report.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def course_plots(run: RunFolder, prefix: str) -> list[Plot]:
    """Every plot that the journals have data for; ``prefix`` makes the ids unique in the page."""
    makers = [_loss, _validation, _throughput, _rate]
    return [plot for index, make in enumerate(makers) if (plot := make(run, f"{prefix}c{index}"))]


def speed(run: RunFolder) -> tuple[list[float], list[float]]:
    """``(steps, tokens per second)``, smoothed."""
    xs, ys = series(run.metrics, "tokens_per_second")
    return drawing.thin(xs, drawing.smooth(ys))


def _loss(run: RunFolder, name: str) -> Plot | None:
    width = max((len(row["loss_stages"]) for row in run.metrics if isinstance(row.get("loss_stages"), list)), default=0)
    if width:
        lines = [(f"stage {k}", series(run.metrics, "loss_stages", k), colour(k)) for k in range(width)]
    else:
        lines = [("loss", series(run.metrics, "loss"), colour(0))]
    if not any(xs for _, (xs, _), _ in lines):
        return None

    def draw(axes: Axes) -> None:
        for label, (xs, ys), own in lines:
            axes.plot(*drawing.thin(xs, ys), color=own, linewidth=0.6, alpha=0.25)
            axes.plot(*drawing.thin(xs, drawing.smooth(ys)), color=own, linewidth=1.4, label=label)
        drawing.step_axis(axes)
        drawing.mark_steps(axes, run.marks, run.metrics[-1]["step"])

    svg = drawing.svg(
        name, draw, x="optimiser step", y="training loss (nats per token)", label="Training loss", legend=4
    )
    return Plot("Training loss by stage", svg, "Faint: every step. Strong: moving average over about 3 % of the run.")


def _validation(run: RunFolder, name: str) -> Plot | None:
    rows = run.validations
    if not rows:
        return None
    full, low = series(rows, "full"), minima(rows)
    width = max(len(row.get("stage") or []) for row in rows)
    stages = [series(rows, "stage", k) for k in range(width if width > 1 else 0)]
    plain = series(rows, "plain") if stages else ([], [])

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, [(f"stage {k}", *xy, {"color": colour(k)}) for k, xy in enumerate(stages)])
        drawing.draw_lines(axes, [(trained_path(run.latest), *full, {"color": drawing.INK, "linewidth": 2.0})])
        drawing.draw_lines(axes, [("plain path", *plain, {"color": drawing.PLAIN})] if plain[0] else [])
        axes.plot(*zip(*low, strict=True), "v", color=drawing.BASELINE, markersize=5, label="new minimum")
        drawing.wide_range(axes, [y for _, ys in (full, plain, *stages) for y in ys])
        drawing.step_axis(axes)
        drawing.mark_steps(axes, run.marks, run.metrics[-1]["step"])

    svg = drawing.svg(name, draw, x="optimiser step", y="bits per UTF-8 byte", label="Validation in training")
    spent = share_of_time(run.metrics)
    cost = "" if spent is None else f" Validation took {100 * spent:.2f} % of the time."
    size = rows[-1].get("bytes")
    note = f"One fixed slice of held-out text{f', {size:,} bytes' if size else ''}; no intervals.{cost}"
    return Plot("Validation in training", svg, note)


def _throughput(run: RunFolder, name: str) -> Plot | None:
    xs, ys = speed(run)
    if not xs:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(xs, ys, color=colour(0), linewidth=1.4)
        from_zero(axes, ys)
        drawing.step_axis(axes)
        drawing.mark_steps(axes, run.marks, xs[-1])

    svg = drawing.svg(name, draw, x="optimiser step", y="tokens per second", label="Throughput")
    return Plot("Training throughput", svg, "Moving average.")


def _rate(run: RunFolder, name: str) -> Plot | None:
    xs, ys = series(run.metrics, "lr_scale")
    if not xs:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*drawing.thin(xs, ys), color=colour(0), linewidth=1.4)
        from_zero(axes, ys)
        drawing.step_axis(axes)
        drawing.mark_steps(axes, run.marks, xs[-1])

    svg = drawing.svg(name, draw, x="optimiser step", y="learning-rate scale", label="Learning-rate scale")
    return Plot("Learning-rate schedule", svg, "Warm-up, constant, warm-down: factor on every group's rate.")
