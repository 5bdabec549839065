"""Several runs beside each other: names that tell them apart, layouts, paired differences, diversity, the gap."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cognica_poe.analysis.changes import between, label_all
from cognica_poe.analysis.gap import gap_to_control
from cognica_poe.errors import UserError
from cognica_poe.release.card.findings import name_of
from cognica_poe.release.card.gap import GAP_TEXT, as_dict, gap_reading, gap_rows, yield_text
from cognica_poe.release.card.readings import comparisons
from cognica_poe.release.card.tables import is_pool, trained_path
from cognica_poe.release.card.training import flat
from cognica_poe.release.report import drawing, page
from cognica_poe.release.report.course import speed
from cognica_poe.release.report.plots import Plot, dig, from_zero, series
from cognica_poe.release.report.run_folder import RunFolder
from cognica_poe.release.text import MISSING, count, html_text, interval, number, percent, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NO_DIFFERENCE = ("name", "description", "release.repo_id")
"""Settings that name a run and change nothing of it."""
_SHOWN = 3  # settings in a name


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run, none twice: its own, with the settings that differ between runs of one name, and where these
    do not tell them apart with its folder and place."""
    found = []
    for run in runs:
        twins = [other for other in runs if other.name == run.name]
        place = next(i for i, other in enumerate(twins) if other is run)
        apart = differences(twins) if len(twins) > 1 else []
        own = [f"{_short(key)} {values[place]}" for key, values in apart if not key.startswith("release.")]
        found.append(f"{run.name} ({'; '.join(own[:_SHOWN])})" if own else run.name)
    for more in ([run.path.name for run in runs], [str(place) for place in range(1, len(runs) + 1)]):
        found = [
            name if found.count(name) == 1 else f"{name}, {extra}" for name, extra in zip(found, more, strict=True)
        ]
    return found


def _short(key: str) -> str:
    return key.rpartition(".")[2].replace("poe_", "").replace("_", " ")


def differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """``(setting, its value in every run)`` where recipes differ; plain text."""
    settings = [{key: _shown(value) for key, value in flat(run.recipe)} for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one if key not in _NO_DIFFERENCE)
    table = [(key, [one.get(key, MISSING) for one in settings]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def comparison(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """The section of several runs, HTML."""
    parts = [
        page.plots(_plots(runs, names)), _figures(runs, names), _paired(runs, names), _gaps(runs),
        _diversity(runs, names), _settings(runs, names),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _figures(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        record = run.latest
        rows.append(
            [html_text(name), trained_path(record), html_text(layout(run)), count(record["step"]),
             count(record.get("tokens_seen")), count(dig(record, "model", "parameters")), number(record["bpb"]["full"]),
             interval(dig(record, "intervals", "full")), percent(dig(record, "accuracy", "full"), 2),
             *(_gap_to(record, role) for role in ("deepest stage", "best stage"))]
        )  # fmt: skip
    header = ("run", "path", "layers by stage", "step", "tokens", "parameters", "bits per byte", "95 % interval",
              "accuracy", "pool minus deepest stage", "pool minus best stage")  # fmt: skip
    return page.table(header, rows, "At the last analysed step", text_columns=3, anchor="comparison-figures")


def layout(run: RunFolder) -> str:
    """``3, 2, 1``, or the layers of one path; plain text."""
    layers = dig(run.latest, "model", "stage_layers") or []
    if is_pool(run.latest):
        return ", ".join(map(str, layers)) or MISSING
    return f"one path of {sum(layers)}" if layers else "one path"


def _gap_to(record: Mapping[str, Any], role: str) -> str:
    found = {item.role: item.figures for item in comparisons(record)}
    return found.get(role, MISSING)


def _paired(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Differences between runs at their last steps, over the same documents."""
    pairs = list(itertools.combinations(range(len(runs)), 2))
    found = []
    for i, j in pairs:
        one, other = runs[i], runs[j]
        sums = [run.sums.get(run.latest["step"]) for run in (one, other)]
        known = sums[0] is not None and sums[1] is not None
        found.append(between(one.latest, other.latest, *sums) if known else {})  # type: ignore[arg-type]  # not None
    rows = []
    for (i, j), figures in zip(pairs, label_all(found), strict=True):
        title = [html_text(names[j]), html_text(names[i])]
        if not figures:
            rows.append([*title, "not measured on one slice", *[MISSING] * 3])
        for figure, change in figures.items():
            words, scale, digits, unit = name_of(figure)
            bounds = f"[{signed(scale * change.low, digits)}, {signed(scale * change.high, digits)}]"
            kind = "signal" if change.signal else "noise"
            rows.append([*title, words, f"{signed(scale * change.value, digits)}{unit}", bounds,
                         f'<span class="{kind}">{kind}</span>'])  # fmt: skip
    header = ("run", "minus", "figure", "difference", "95 % interval", "reading")
    said = (
        "Both runs at their last analysed steps, over the same documents (acceptance: prompts). A signal's interval "
        "excludes zero and its p-value holds Holm's correction over the pairs. One training each: what another seed "
        "would change is not in these intervals."
    )
    return page.table(header, rows, "Paired differences", text_columns=3, anchor="comparison-paired") + f"<p>{said}</p>"


def _gaps(runs: Sequence[RunFolder]) -> str:
    """Every pool against the control runs among the others."""
    blocks = []
    for run in runs:
        gap = gap_among(run, runs)
        if gap is not None:
            rows = [tuple(html_text(cell) for cell in row) for row in gap_rows(gap)]
            text = f"{html_text(gap_reading(gap), 600)} {html_text(GAP_TEXT, 600)}"
            text += f" {html_text(yield_text(gap['shallow']), 400)}" if gap.get("shallow") else ""
            title = f"Gap of {run.name} to backprop"
            blocks += [page.table(("figure", "value", "95 % interval"), rows, title), f"<p>{text}</p>"]
    return "\n".join(blocks)


def gap_among(run: RunFolder, runs: Sequence[RunFolder]) -> dict[str, Any] | None:
    """The gap of a pool to its control among ``runs``, at their last steps; None where none of them is one.

    A control is trained by backprop and has the pool's layers and width, a shallow run those of stage 0.
    """
    step = run.latest["step"]
    layers = dig(run.latest, "model", "stage_layers") or []
    if not is_pool(run.latest) or len(layers) < 2 or step not in run.sums:
        return None
    sides = {}
    for other in runs:
        at = other.latest["step"]
        depth = sum(dig(other.latest, "model", "stage_layers") or [])
        same = dig(other.recipe, "model", "hidden_size") == dig(run.recipe, "model", "hidden_size")
        if not is_pool(other.latest) and same and at in other.sums and depth in (sum(layers), layers[0]):
            sides[depth] = (other.latest, other.sums[at])
    if sum(layers) not in sides:
        return None
    try:
        pool = (run.latest, run.sums[step])
        return as_dict(gap_to_control(pool, sides[sum(layers)], sides.get(layers[0])))
    except UserError:  # another slice: the table of paired differences says so
        return None


def _diversity(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """What the stage heads are to each other, run beside run; nothing where no record says."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        heads = run.latest.get("heads") or {}
        unique, aligned = heads.get("unique_share") or [], heads.get("alignment") or []
        if not unique:
            continue
        pairs = [f"{i}-{j}: {number(aligned[i][j], 3)}" for i, j in itertools.combinations(range(len(aligned)), 2)]
        known = [share for share in unique if share is not None]
        rows.append([html_text(name), html_text(layout(run)), html_text(", ".join(pairs), 400),
                     ", ".join(percent(share) for share in unique),
                     percent(sum(known) / len(known)) if known else MISSING])  # fmt: skip
    header = ("run", "layers by stage", "alignment of dominant vectors", "unique share by stage", "unique in all")
    said = "<p>Heads of the last analysed step, from their weights alone: no intervals.</p>" if rows else ""
    return (
        (page.table(header, rows, "Diversity of the stage heads", text_columns=3, anchor="comparison-diversity") + said)
        if rows
        else ""
    )


def _settings(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    found = differences(runs)
    if not found:
        return ""
    rows = [[f"<code>{html_text(key)}</code>", *(html_text(value) for value in values)] for key, values in found]
    head = ["setting", *map(html_text, names)]
    return page.table(head, rows, "What differs in the recipes", text_columns=len(head), anchor="comparison-recipes")


def _plots(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Plot]:
    title = "Bits per byte on each run's trained path"
    return [
        _compare(runs, names, "cmp0", title, "bits per byte", _trained_bpb, True),
        _compare(runs, names, "cmp1", "Next-token accuracy, trained path", "accuracy (%)", _trained_accuracy, False),
        _compare(runs, names, "cmp2", "Throughput", "tokens per second", speed, False),
    ]


def _trained_bpb(run: RunFolder) -> tuple[list[float], list[float]]:
    return series(run.records, "bpb", "full")


def _trained_accuracy(run: RunFolder) -> tuple[list[float], list[float]]:
    xs, ys = series(run.records, "accuracy", "full")
    return xs, [100 * y for y in ys]


def _compare(
    runs: Sequence[RunFolder],
    names: Sequence[str],
    name: str,
    title: str,
    unit: str,
    take: Callable[[RunFolder], tuple[list[float], list[float]]],
    logarithmic: bool,
) -> Plot:
    lines: list[drawing.Line] = []
    for index, run in enumerate(runs):
        xs, ys = take(run)
        lines.append((names[index], xs, ys, {"color": drawing.RUN_COLOURS[index % len(drawing.RUN_COLOURS)]}))

    def draw(axes: Axes) -> None:
        drawing.draw_lines(axes, lines)
        drawing.step_axis(axes)
        if logarithmic:
            drawing.wide_range(axes, [y for _, _, ys, _ in lines for y in ys])
        elif unit.startswith("tokens"):
            from_zero(axes, [y for _, _, ys, _ in lines for y in ys])

    columns = 1 if max(map(len, names)) > 18 else 3
    svg = drawing.svg(name, draw, x="optimiser step", y=unit, label=title, legend=columns)
    return Plot(title, svg, "One line per run.")
