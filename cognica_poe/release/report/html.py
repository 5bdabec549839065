"""The trajectory report: one self-contained HTML file of plots and tables made from run folders.

No script, no outside resource; every number comes from ``metrics.jsonl``, ``analysis/step-N.json``, ``recipe.json`` and
the data manifest of the runs. Model outputs are escaped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import write_bytes
from cognica_poe.leftovers import sweep
from cognica_poe.release.card.findings import findings
from cognica_poe.release.card.readings import gap_lines, routing_reading, wand_reading
from cognica_poe.release.card.series import sections
from cognica_poe.release.card.tables import (
    bpb_rows,
    is_pool,
    layers_used,
    source_rows,
    stage_count,
    trained_path,
    validation_text,
)
from cognica_poe.release.card.training import flat
from cognica_poe.release.published import Published, is_published, read_published
from cognica_poe.release.report import page
from cognica_poe.release.report.comparison import comparison, labels, layout
from cognica_poe.release.report.course import course_plots
from cognica_poe.release.report.plots import dig, run_plots
from cognica_poe.release.report.probes import probes_section
from cognica_poe.release.report.published import beside, published_section
from cognica_poe.release.report.run_folder import RunFolder, read_run
from cognica_poe.release.report.tasks import tasks_section
from cognica_poe.release.text import MISSING, count, html_text, interval, number, percent


def write_report(runs: Sequence[Path], out: Path, since: int | None = None) -> Path:
    """Write the report of one or several runs, and of imported trajectories among them; returns the HTML file.

    ``out``: the file (``*.html``) or the folder that gets ``index.html``. ``since``: the step that cumulative changes
    start from, in every run. The same run folders give the same bytes. Raises UserError for a missing run folder, a run
    without analysis records or without one of ``since``, and a page there that is not ours.
    """
    if not runs:
        raise UserError("no run to report on: pass at least one run folder")
    published = [read_published(path) for path in runs if is_published(path)]
    loaded = [read_run(path, since) for path in runs if not is_published(path)]
    out = Path(out)
    file = out if out.suffix == ".html" else out / "index.html"
    if os.path.lexists(file) and not (file.is_file() and page.MARK.encode() in file.read_bytes()[:1000]):
        raise UserError(
            f"{file} exists and is not a report made by cognica-poe: choose another --out, or remove it yourself"
        )
    text = render_report(loaded, published)
    sweep(file.parent)
    write_bytes(file, text.encode())
    return file


def render_report(runs: Sequence[RunFolder], published: Sequence[Published] = ()) -> str:
    """The whole page, HTML. The same runs give the same bytes."""
    names = labels(runs)
    everyone = [*names, *(item.name for item in published)]
    title = " and ".join(everyone) if len(everyone) < 4 else f"{everyone[0]} and {len(everyone) - 1} more"
    body = []
    if len(runs) > 1:
        body.append(page.section("Comparison", comparison(runs, names), "comparison"))
    if published and (together := beside(runs, names, published)):
        body.append(page.section("Beside published trajectories", together, "beside"))
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        heading = f"Run {name}: {_kind(run)}" if len(everyone) > 1 else f"What was trained: {_kind(run)}"
        body.append(page.section(heading, _run_section(run, f"r{index}-"), f"r{index}-run"))
    for index, item in enumerate(published):
        heading = f"Published: {item.name}, {len(item.rows)} checkpoints"
        body.append(page.section(heading, published_section(item, f"p{index}-"), f"p{index}-published"))
    body.append(page.section("What the figures are", page.GLOSSARY, "glossary"))
    parts = "\n".join(body)
    tiles = [_tiles(run, name if len(everyone) > 1 else "") for run, name in zip(runs, names, strict=True)]
    head = [page.header(title, _subtitle(runs, published)), '<div class="tiles">', *tiles, "</div>"]
    return page.document(title, "\n".join([*head, page.contents(parts), parts]))


def _kind(run: RunFolder) -> str:
    """What a run is, in a line: layout, size, data; plain text."""
    record, mix = run.latest, str(run.data.get("mix") or "")
    if is_pool(record):
        what = f"{stage_count(record)} stages of {layout(run)} layers"
    else:
        what = f"{layout(run)} layers, ordinary backprop"
    size = dig(record, "model", "parameters")
    data = f", trained on {Path(mix).name}" if mix else ""
    return f"{what}{f', {_millions(size)} parameters' if size else ''}{data}"


def _millions(size: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6)):
        if size >= factor:
            return f"{size / factor:.2f}{unit}"
    return count(size)


def _subtitle(runs: Sequence[RunFolder], published: Sequence[Published]) -> str:
    total = sum(len(run.records) for run in runs)
    checkpoints = f"{total} analysed checkpoint{'s' * (total != 1)}"
    if len(runs) == 1 and not published:
        run = runs[0]
        steps = dig(run.recipe, "training", "steps")
        done = f", step {count(run.latest['step'])}{f' of {count(steps)}' if steps else ''}"
        return f"Trajectory report: {_kind(run)}{done}, {checkpoints}."
    parts = [f"{len(runs)} run{'s' * (len(runs) != 1)}, {checkpoints}"] if runs else []
    if published:
        rows = sum(len(item.rows) for item in published)
        parts.append(f"{len(published)} published, {rows} checkpoints")
    return f"Trajectory report: {'; '.join(parts)}."


def _tiles(run: RunFolder, name: str) -> str:
    record = run.latest
    bounds = interval(dig(record, "intervals", "full"), 3)
    size = dig(record, "model", "parameters")
    stages = f"{stage_count(record)} stages" if is_pool(record) else "trained end to end"
    tiles = [
        ("bits per byte", number(record["bpb"]["full"], 3), f"{trained_path(record)}, 95 % {bounds}"),
        ("xz -9e", number(dig(record, "baseline", "xz_bpb"), 3), "bits per byte of the same text"),
        ("primed xz", number(dig(record, "baseline", "xz_primed_bpb"), 3), "xz that has read the training text"),
        ("accuracy", percent(dig(record, "accuracy", "full")), "next token, top-1"),
        ("step", count(record["step"]), f"{count(record.get('tokens_seen'))} tokens seen"),
        ("parameters", _millions(size) if size else MISSING, f"{count(size)}, {stages}"),
    ]
    if is_pool(record):
        tiles.append(
            ("drafts accepted", percent(dig(record, "speculative", "acceptance")), "self-speculative decoding")
        )
    return page.tiles(name, tiles)


def _run_section(run: RunFolder, prefix: str) -> str:
    parts = []
    if run.recipe.get("description"):
        parts.append(f"<p>{html_text(run.recipe['description'], 1000)}</p>")
    parts += [
        page.subsection("Curves", page.plots(course_plots(run, prefix) + run_plots(run, prefix)), f"{prefix}curves"),
        _paths_table(run, prefix),
        page.subsection("What the record says", page.listing(_readings(run.latest)), f"{prefix}readings"),
        _series(run, prefix),
        page.subsection("Findings by checkpoint", _findings(run), f"{prefix}findings"),
        page.subsection("Probe prompts", probes_section(run.records), f"{prefix}probes"),
        tasks_section(run.path, run.records),
        page.subsection("Load a revision", _loading(run), f"{prefix}loading"),
        _data_table(run, prefix),
        page.subsection("Settings and events", _recipe_table(run.recipe) + _events_table(run), f"{prefix}settings"),
    ]
    return "\n".join(part for part in parts if part)


def _findings(run: RunFolder) -> str:
    """What is a signal at which checkpoint, HTML."""
    return page.listing([html_text(found.text, 2000) for found in findings(run.trajectory)])


def _paths_table(run: RunFolder, prefix: str) -> str:
    record = run.latest
    rows = [(path, count(layers_used(record, path)), number(bpb), interval(bounds), percent(accuracy, 2))
            for path, bpb, bounds, accuracy in bpb_rows(record)]  # fmt: skip
    header = ("path", "layers used", "bits per byte", "95 % interval", "accuracy")
    return page.table(header, rows, f"Every path at step {count(record['step'])}", anchor=f"{prefix}paths")


def _readings(record: Mapping[str, Any]) -> list[str]:
    """Sentences that sign and interval give, HTML."""
    if not is_pool(record):
        return []
    lines = [f"The full pool against the {line}; bits per byte, paired." for line in gap_lines(record)]
    lines += [line for line in (wand_reading(record), routing_reading(record)) if line]
    return [html_text(line.replace("`", ""), 600) for line in lines]


def _series(run: RunFolder, prefix: str) -> str:
    """The tables over steps, the same as those of the card."""
    parts = []
    for place, section in enumerate(sections(run.trajectory, {})):
        head = [html_text(name, 80) for name in section.header]
        rows = [[_labelled(html_text(cell, 200)) for cell in row] for row in section.rows]
        words = int(section.first_is_words)
        parts.append(page.table(head, rows, section.title, text_columns=words, anchor=f"{prefix}table{place}"))
        parts += [f"<p>{html_text(text, 1000)}</p>" for text in (section.text, section.note) if text]
    return "\n".join(parts)


def _labelled(cell: str) -> str:
    for word in ("signal", "noise"):
        cell = cell.replace(word, f'<span class="{word}">{word}</span>')
    return cell


def _shown_path(path: Path) -> str:
    """A path a reader can use: relative to where the report was made where possible, else the folder's name."""
    if not path.is_absolute():
        return path.as_posix()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def _loading(run: RunFolder) -> str:
    folder = _shown_path(run.path)
    if not run.revisions:
        step = run.latest["step"]
        code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}/release/step-{step}"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"""
        return page.code(code)
    blocks: list[str] = []
    for repo, refs in run.revisions.items():
        steps = sorted((name for name in refs if name.startswith("step-")), key=lambda name: int(name[5:]))
        code = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

where = dict(revision="{steps[-1] if steps else "main"}", cache_dir="{folder}/release/hub", local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True, **where)
model = AutoModelForCausalLM.from_pretrained("{repo}", trust_remote_code=True, **where)"""
        rows = [(html_text(name), f"<code>{html_text(refs[name])}</code>") for name in [*steps, "main"] if name in refs]
        blocks += [page.code(code), page.table(("revision", "commit"), rows, "Published revisions", last_is_text=True)]
    return "\n".join(blocks)


_TEXT_COLUMNS = ("name", "dataset", "revision", "languages", "licence")


def _data_table(run: RunFolder, prefix: str) -> str:
    sources = source_rows(run.data)
    parts = []
    if sources:
        keys = [*_TEXT_COLUMNS, *(key for key in sources[0] if key not in _TEXT_COLUMNS)]
        known = [key for key in keys if any(_shown(item.get(key)) for item in sources)]
        rows = [[_plain(key, item.get(key)) for key in known] for item in sources]
        names = [html_text(key.replace("_", " "), 40) for key in known]
        text = sum(key in _TEXT_COLUMNS for key in known)
        parts.append(page.table(names, rows, "Data by source", text_columns=text, anchor=f"{prefix}data"))
    if validation := run.latest.get("validation"):
        said = f"{validation_text(validation)}, {count(validation.get('bytes'))} bytes"
        parts.append(f"<p>Validation: {html_text(said)}.</p>")
    return "\n".join(parts)


def _shown(value: Any) -> bool:
    return isinstance(value, (str, int, float, list)) and value not in ("", [])


def _plain(key: str, value: Any) -> str:
    if isinstance(value, float) and (key.endswith("share") or key.startswith("share")):
        return percent(value)
    if isinstance(value, list):
        return html_text(", ".join(map(str, value)), 80)
    if isinstance(value, int):
        return count(value)
    return number(value) if isinstance(value, float) else html_text(MISSING if value is None else value, 80)


def _recipe_table(recipe: Mapping[str, Any]) -> str:
    rows = [(f"<code>{html_text(key)}</code>", html_text(value)) for key, value in flat(recipe) if key != "description"]
    return page.fold("Recipe", page.table(("setting", "value"), rows, text_columns=2)) if rows else ""


def _events_table(run: RunFolder) -> str:
    events = run.events
    if not events:
        return ""
    shown = events[-30:]
    rows = []
    for event in shown:
        kind = event.get("event", MISSING)
        rest = {key: value for key, value in event.items() if key not in ("step", "event")}
        detail = ", ".join(f"{key} {value}" for key, value in rest.items())
        rows.append((count(event.get("step")), html_text(kind, 60), html_text(detail, 300)))
    left = f" (the last {len(shown)} of {len(events)})" if len(shown) < len(events) else ""
    body = page.table(("step", "event", "detail"), rows, "", text_columns=0, last_is_text=True)
    return page.fold(f"Events{left}", body)
