"""Drawing of plots as inline SVG: deterministic bytes, colours that follow the page's theme.

matplotlib's object interface alone is used (no pyplot, no global figure). Two colours are stand-ins: whatever is drawn
in ``INK`` or ``GRID`` becomes a CSS variable of the page, so that one SVG serves light and dark.
"""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cognica_poe.release.history import Mark

INK, GRID = "#0a0b0c", "#0a0b0d"
STAGE_COLOURS = ("#3987e5", "#199e70", "#d98a00", "#d55181", "#9085e9", "#008300", "#e66767", "#7a8794")
RUN_COLOURS = ("#3987e5", "#d98a00", "#199e70", "#d55181", "#9085e9", "#7a8794")
PLAIN, BASELINE = "#8b8f96", "#c0504d"
MARKS: dict[str, tuple[str, Any, str]] = {
    "epoch": ("#9085e9", ":", "epoch begins"),
    "resume": ("#7a8794", (0, (1, 1.5)), "resumed"),
    "roll back": ("#c0504d", "-.", "rolled back"),
    "recipe": ("#199e70", (0, (4, 2)), "recipe changed"),
}
"""Colour, style and name of a line where something happened, by kind."""
_SIZE = (4.7, 3.55)  # inches; about the width of a phone at 1:1
_POINTS = 400
_IDS = re.compile(r"url\(#|xlink:href=\"#|id=\"")  # what stands before an id
_VIEW = re.compile(r'viewBox="([^"]+)"')

Line = tuple[str, Sequence[float], Sequence[float], dict[str, Any]]
"""Label, x, y, and keywords of ``Axes.plot``."""


def svg(name: str, draw: Callable[[Axes], None], *, x: str, y: str, label: str, legend: int = 3) -> str:
    """An SVG element. ``name`` prefixes its ids (unique in a page), ``label`` is read to those who cannot see it,
    ``legend`` its number of columns (0: none)."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": "cognica-poe",
        "svg.fonttype": "none",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(style):
        canvas = FigureCanvasSVG(Figure(figsize=_SIZE, layout="constrained"))
        axes = canvas.figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        handles, labels = axes.get_legend_handles_labels()
        if legend and handles:
            canvas.figure.legend(
                handles, labels, loc="outside lower center", ncols=legend, frameon=False, fontsize=9, handlelength=1.8,
                columnspacing=1.2, labelspacing=0.35,
            )  # fmt: skip
        out = io.BytesIO()
        canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue().decode(), name, label)


def _inline(drawn: str, name: str, label: str) -> str:
    """Strip the XML prologue, make ids unique, hand the two stand-in colours to CSS and let the width follow."""
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
    drawn = _IDS.sub(lambda match: match.group(0) + f"{name}-", drawn)
    drawn = drawn.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    view = _VIEW.findall(drawn)[0]
    body = drawn[drawn.index(">") + 1 :]
    return f'<svg class="plot" role="img" aria-label="{html.escape(label)}" viewBox="{view}">{body}'


def thin(xs: Sequence[float], ys: Sequence[float], points: int = _POINTS) -> tuple[list[float], list[float]]:
    """At most ``points`` points: means over equal buckets of consecutive ones."""
    size = -(-len(xs) // points) if xs else 1
    if size <= 1:
        return list(xs), list(ys)
    starts = range(0, len(xs), size)
    return [_mean(xs[i : i + size]) for i in starts], [_mean(ys[i : i + size]) for i in starts]


def smooth(ys: Sequence[float], share: float = 0.03) -> list[float]:
    """Centred moving average over about ``share`` of the points (narrower at the ends, so that it does not lag)."""
    half = int(share * len(ys) / 2)
    sums = [0.0, *itertools.accumulate(ys)]
    out = []
    for i in range(len(ys)):
        reach = min(half, i, len(ys) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def draw_lines(axes: Axes, lines: Iterable[Line]) -> None:
    """Lines with markers where they have few points."""
    for label, xs, ys, style in lines:
        marker = {"marker": "o", "markersize": 3.2} if len(xs) <= 40 and "linestyle" not in style else {}
        axes.plot(xs, ys, label=label, **{"linewidth": 1.4, **marker, **style})


def step_axis(axes: Axes) -> None:
    """Whole, thousands-separated steps from the first one on."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def wide_range(axes: Axes, values: Iterable[float]) -> None:
    """Limits around ``values``, logarithmic where positive ones differ by more than half, with five to eight ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    values = [value for value in values if value is not None]
    if not values:
        return
    if min(values) <= 0 or max(values) / min(values) < 1.5:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
        return
    low, high = min(values) * 0.96, max(values) * 1.04
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = [float(tick) for tick in MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    if high / low > 6:  # evenly spaced values would crowd at the top
        wanted = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        ticks = [base * 10.0**power for power in range(-3, 7) for base in wanted]
    ticks = [tick for tick in ticks if low <= tick <= high]
    while len(ticks) > 8:
        ticks = ticks[::2]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def band(axes: Axes, rows: Sequence[tuple[float, float, float]], colour: str) -> None:
    """``(x, low, high)`` each: intervals as a faint band (drawn as bars where there is one point only)."""
    if not rows:
        return
    xs, lows, highs = (list(column) for column in zip(*rows, strict=True))
    if len(xs) > 1:
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.16, linewidth=0)
    else:
        axes.vlines(xs, lows, highs, color=colour, linewidth=1.2)


def mark_steps(axes: Axes, marks: Sequence[Mark], last: float) -> None:
    """Vertical lines where something happened up to step ``last``, one kind one style, named in the legend."""
    named: set[str] = set()
    for mark in marks:
        if mark.step <= last:
            colour, style, label = MARKS[mark.kind]
            axes.axvline(
                mark.step, color=colour, linestyle=style, linewidth=1.0, label=None if label in named else label
            )
            named.add(label)


def horizontal(axes: Axes, value: float | None, label: str, style: str) -> None:
    """A baseline, named in the legend."""
    if value is not None:
        axes.axhline(value, color=BASELINE, linestyle=style, linewidth=1.2, label=label)
