"""The trajectory report: one self-contained HTML file of plots and tables made from run folders.

No script, no outside resource; every number comes from ``metrics.jsonl``, ``analysis/step-N.json``, ``recipe.json`` and
the data manifest of the runs. Model outputs are escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import write_bytes
from cognica_poe.leftovers import sweep
from cognica_poe.release.card.readings import gap_lines, routing_reading, wand_reading
from cognica_poe.release.card.series import sections
from cognica_poe.release.card.tables import bpb_rows, is_pool, source_rows, stage_count, trained_path, validation_text
from cognica_poe.release.report import page
from cognica_poe.release.report.plots import comparison_plots, dig, run_plots
from cognica_poe.release.report.probes import probes_section
from cognica_poe.release.report.run_folder import RunFolder, read_run
from cognica_poe.release.text import MISSING, count, html_text, interval, number, percent
from cognica_poe.release.trajectory import Trajectory


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the report of one or several runs and return the HTML file.

    ``out``: the file (``*.html``) or the folder that gets ``index.html``. The same run folders give the same bytes.
    Raises UserError for a missing run folder, a run without analysis records, and a page there that is not ours.
    """
    if not runs:
        raise UserError("no run to report on: pass at least one run folder")
    loaded = [read_run(path) for path in runs]
    out = Path(out)
    file = out if out.suffix == ".html" else out / "index.html"
    if os.path.lexists(file) and not (file.is_file() and page.MARK.encode() in file.read_bytes()[:1000]):
        raise UserError(
            f"{file} exists and is not a report made by cognica-poe: choose another --out, or remove it yourself"
        )
    sweep(file.parent)
    write_bytes(file, render_report(loaded).encode())
    return file


def render_report(runs: Sequence[RunFolder]) -> str:
    """The whole page, HTML. The same runs give the same bytes."""
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{runs[0].name} and {len(runs) - 1} more runs"
    names = [run.name for run in runs]
    body = [page.header(title, _subtitle(runs)), '<div class="tiles">', *(_tiles(run, len(runs) > 1) for run in runs)]
    body.append("</div>")
    if len(runs) > 1:
        body += [page.section("Comparison", page.plots(comparison_plots(runs)) + _comparison_table(runs), "comparison")]
    for index, run in enumerate(runs):
        name = run.name if names.count(run.name) == 1 else f"{run.name} ({run.path})"
        body.append(_run_section(run, name, f"r{index}-"))
    body.append(page.section("What the figures are", page.GLOSSARY, "glossary"))
    return page.document(title, "\n".join(body))


def _subtitle(runs: Sequence[RunFolder]) -> str:
    total = sum(len(run.records) for run in runs)
    return f"Trajectory report: {len(runs)} run{'s' * (len(runs) > 1)}, {total} analysed checkpoints."


def _tiles(run: RunFolder, named: bool) -> str:
    record = run.latest
    bounds = interval(dig(record, "intervals", "full"), 3)
    tiles = [
        ("bits per byte", number(record["bpb"]["full"], 3), f"{trained_path(record)}, 95 % {bounds}"),
        ("xz -9e", number(dig(record, "baseline", "xz_bpb"), 3), "bits per byte of the same text"),
        ("primed xz", number(dig(record, "baseline", "xz_primed_bpb"), 3), "xz that has read the training text"),
        ("accuracy", percent(dig(record, "accuracy", "full")), "next token, top-1"),
        ("step", count(record["step"]), f"{count(record.get('tokens_seen'))} tokens seen"),
        (
            "parameters",
            count(dig(record, "model", "parameters")),
            f"{stage_count(record)} stages" if is_pool(record) else "trained end to end",
        ),
    ]
    if is_pool(record):
        tiles.append(
            ("drafts accepted", percent(dig(record, "speculative", "acceptance")), "self-speculative decoding")
        )
    return page.tiles(run.name if named else "", tiles)


def _comparison_table(runs: Sequence[RunFolder]) -> str:
    rows = []
    for run in runs:
        record = run.latest
        rows.append(
            [html_text(run.name), trained_path(record), count(record["step"]),
             count(record.get("tokens_seen")), count(dig(record, "model", "parameters")), number(record["bpb"]["full"]),
             interval(dig(record, "intervals", "full")), percent(dig(record, "accuracy", "full"), 2)]
        )  # fmt: skip
    header = ("run", "path", "step", "tokens", "parameters", "bits per byte", "95 % interval", "accuracy")
    return page.table(header, rows, "At the last analysed step", text_columns=2)


def _run_section(run: RunFolder, name: str, prefix: str) -> str:
    parts = []
    if run.recipe.get("description"):
        parts.append(f"<p>{html_text(run.recipe['description'], 1000)}</p>")
    parts += [
        page.plots(run_plots(run, prefix)),
        _paths_table(run),
        page.subsection("What the record says", page.listing(_readings(run.latest))),
        _series(run),
        page.subsection("Probe prompts", probes_section(run.records)),
        page.subsection("Load a revision", _loading(run)),
        _data_table(run),
        _recipe_table(run.recipe),
        _events_table(run.events),
    ]
    return page.section(name, "\n".join(part for part in parts if part), f"{prefix}run")


def _paths_table(run: RunFolder) -> str:
    rows = [(path, number(bpb), interval(bounds), percent(accuracy, 2))
            for path, bpb, bounds, accuracy in bpb_rows(run.latest)]  # fmt: skip
    header = ("path", "bits per byte", "95 % interval", "accuracy")
    return page.table(header, rows, f"Every path at step {count(run.latest['step'])}")


def _readings(record: Mapping[str, Any]) -> list[str]:
    """Sentences that sign and interval give, HTML."""
    if not is_pool(record):
        return []
    lines = [f"The full pool against the {line}; bits per byte, paired." for line in gap_lines(record)]
    lines += [line for line in (wand_reading(record), routing_reading(record)) if line]
    return [html_text(line.replace("`", ""), 600) for line in lines]


def _series(run: RunFolder) -> str:
    """The tables over steps, the same as those of the card."""
    parts = []
    for section in sections(Trajectory.of(run.records, run.sums, run.missing), {}):
        head = [html_text(name, 80) for name in section.header]
        rows = [[_labelled(html_text(cell, 200)) for cell in row] for row in section.rows]
        parts.append(page.table(head, rows, section.title, text_columns=0))
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


_TEXT_COLUMNS = ("name", "dataset", "revision", "licence")


def _data_table(run: RunFolder) -> str:
    sources = source_rows(run.data)
    parts = []
    if sources:
        keys = [*_TEXT_COLUMNS, *(key for key in sources[0] if key not in _TEXT_COLUMNS)]
        known = [key for key in keys if any(_shown(item.get(key)) for item in sources)]
        rows = [[_plain(key, item.get(key)) for key in known] for item in sources]
        names = [html_text(key.replace("_", " "), 40) for key in known]
        text = sum(key in _TEXT_COLUMNS for key in known)
        parts.append(page.table(names, rows, "Data by source", text_columns=text))
    if validation := run.latest.get("validation"):
        said = f"{validation_text(validation)}, {count(validation.get('bytes'))} bytes"
        parts.append(f"<p>Validation: {html_text(said)}.</p>")
    return "\n".join(parts)


def _shown(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and value != ""


def _plain(key: str, value: Any) -> str:
    if isinstance(value, float) and (key.endswith("share") or key.startswith("share")):
        return percent(value)
    if isinstance(value, int):
        return count(value)
    return number(value) if isinstance(value, float) else html_text(MISSING if value is None else value, 80)


def _recipe_table(recipe: Mapping[str, Any]) -> str:
    rows = list(_flat(recipe))
    if not rows:
        return ""
    body = page.table(
        ("setting", "value"), [(f"<code>{html_text(key)}</code>", html_text(value)) for key, value in rows]
    )
    return page.fold("Recipe", body)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        elif item is not None and key != "description":
            yield f"{prefix}{key}", item


def _events_table(events: Sequence[Mapping[str, Any]]) -> str:
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
