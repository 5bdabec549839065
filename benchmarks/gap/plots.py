"""The two pictures of the study: how far every arm is from backprop, and what its drafts are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gap.report import ACCEPTANCE, SUCCESS
from cognica_poe.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOT, LIMIT = "#3987e5", "#c0504d"


def write_plots(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a summary's arms into ``folder`` as ``gap.svg`` and ``drafts.svg``. Returns the files.

    Raises UserError when no arm is compared yet.
    """
    rows = [row for row in found["arms"] if row["name"] != "C1"]
    if not rows:
        raise UserError("no arm has been compared with C1 yet: there is nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    tokens = f"{found['tokens'] / 1e6:.0f}M tokens"
    drafting = [row for row in rows if row["acceptance"] is not None]
    files = [_draw(folder / "gap.svg", lambda axes: _gaps(axes, rows, tokens), 0.45 * len(rows) + 1.4)]
    if drafting:
        files.append(_draw(folder / "drafts.svg", lambda axes: _drafts(axes, drafting, tokens), 4.0))
    return files


def _draw(file: Path, draw: Callable[[Axes], None], height: float) -> Path:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "cognica-poe", "svg.fonttype": "none", "font.size": 10}):
        canvas = FigureCanvasSVG(Figure(figsize=(6.4, height), layout="constrained"))
        axes = canvas.figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
        draw(axes)
        canvas.print_svg(str(file), metadata={"Date": None, "Creator": None})
    return file


def _percent(row: dict[str, Any]) -> tuple[float, list[list[float]]]:
    """The pool's gap in percent, and the lengths of its interval to either side."""
    value, low, high = (100 * row[key] for key in ("pool_gap", "low", "high"))
    return value, [[value - low], [high - value]]


def _gaps(axes: Axes, rows: Sequence[dict[str, Any]], tokens: str) -> None:
    names = [f"{row['name']}  {row['about']}" for row in rows]
    for place, row in enumerate(rows):
        value, lengths = _percent(row)
        axes.errorbar(value, place, xerr=lengths, fmt="o", color=DOT, capsize=3)
    axes.axvline(0.0, color="#7a8794", linewidth=1.0)
    axes.axvline(100 * SUCCESS, color=LIMIT, linestyle="--", linewidth=1.0)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"bits per byte above C1, in percent, with 95 % intervals; {tokens}; dashed: 1 %")


def _drafts(axes: Axes, rows: Sequence[dict[str, Any]], tokens: str) -> None:
    for row in rows:
        value, lengths = _percent(row)
        axes.errorbar(row["acceptance"], value, yerr=lengths, fmt="o", color=DOT, capsize=3)
        axes.annotate(row["name"], (row["acceptance"], value), textcoords="offset points", xytext=(6, 5))
    axes.axhline(100 * SUCCESS, color=LIMIT, linestyle="--", linewidth=1.0)
    flat = next((row["acceptance"] for row in rows if row["name"] == "T1"), None)
    if flat is not None:
        axes.axvline(ACCEPTANCE * flat, color=LIMIT, linestyle="--", linewidth=1.0)
    axes.set_xlabel(f"drafts of stage 0 that the pool accepts; {tokens}; dashed: {ACCEPTANCE} of T1's, and 1 %")
    axes.set_ylabel("bits per byte above C1, percent")
