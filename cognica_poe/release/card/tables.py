"""The measured tables of one step: one function per section of a card, each a pure function of an analysis record."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from cognica_poe.release.card.capabilities import verdict
from cognica_poe.release.card.readings import Record, gap_lines, speed_figures, wand_reading
from cognica_poe.release.text import count, interval, markdown_table, markdown_text, number, percent


def stage_count(record: Record) -> int:
    """K, from the record's own stage figures."""
    return len(record["bpb"]["stage"])


def is_pool(record: Record) -> bool:
    """Whether the pooled stage heads are the trained path (False: the plain backprop path)."""
    return record.get("path", "pool") == "pool"


def trained_path(record: Record) -> str:
    """Name of the path the model was trained on, which every ``full`` figure of its record stands for."""
    return "full pool" if is_pool(record) else "plain path"


def bpb_rows(record: Record) -> list[tuple[str, Any, Any, Any]]:
    """``(path, bits per byte, interval, accuracy)`` of every path of one record, the trained one first."""
    bpb, accuracy, intervals = record["bpb"], record.get("accuracy") or {}, record.get("intervals") or {}

    def at(kind: str, index: int) -> tuple[Any, Any]:
        """Interval and accuracy of one stage or prefix."""
        found = (figures.get(kind) or [] for figures in (intervals, accuracy))
        low_high, share = (values[index] if index < len(values) else None for values in found)
        return low_high, share

    rows = [(trained_path(record), bpb["full"], intervals.get("full"), accuracy.get("full"))]
    if not is_pool(record):
        return rows
    for stage, value in enumerate(bpb["stage"]):
        rows.append((f"stage {stage} alone", value, *at("stage", stage)))
    for index, value in enumerate(bpb.get("prefix") or []):
        if 0 < index < len(bpb["stage"]) - 1:  # the first prefix is stage 0 alone, the last the full pool
            rows.append((f"first {index + 1} stages", value, *at("prefix", index)))
    rows.append(("plain path", bpb.get("plain"), intervals.get("plain"), accuracy.get("plain")))
    return rows


def layers_used(record: Record, path: str) -> int | None:
    """Layers that a path of ``bpb_rows`` runs; None where the record does not say."""
    ends = list(itertools.accumulate(record["model"].get("stage_layers") or []))
    if not ends:
        return None
    word, _, rest = path.partition(" ")
    number_of = rest.partition(" ")[0]
    if word == "stage" and int(number_of) < len(ends):
        return ends[int(number_of)]
    return ends[int(number_of) - 1] if word == "first" and int(number_of) <= len(ends) else ends[-1]


def measured_speed(record: Record, path: str) -> str:
    """How fast decoding by a path of ``bpb_rows`` was timed against plain decoding; empty where it was not."""
    mode = path.replace("first ", "prefix ").replace(" stages", "").replace(" alone", "")
    timed = next((item for item in record.get("speeds") or [] if item["mode"] == mode), None)
    return speed_figures(timed) if timed else ""


def measurements(record: Record) -> str:
    """Every path of one record, its crossover gap and its early exits."""
    timed = any(measured_speed(record, path) for path, *_ in bpb_rows(record))
    rows = [
        [f"**{path}**" if path == trained_path(record) else path, count(layers_used(record, path)), number(bpb),
         interval(bounds), percent(accuracy, 2), *([measured_speed(record, path)] if timed else [])]
        for path, bpb, bounds, accuracy in bpb_rows(record)
    ]  # fmt: skip
    header = ["path", "layers used", "bits per byte", "95 % interval", "next-token accuracy"]
    header += ["measured speed"] if timed else []
    lines = [f"## Measurements at step {count(record['step'])}", "", markdown_table(header, rows)]
    if not is_pool(record):
        return "\n".join(lines)
    if readings := gap_lines(record):
        lines += [
            "",
            "The trained path is in bold. The full pool against other uses of the same weights, in bits per byte and "
            "paired over documents (best: by its figure on this text):",
            "",
            *(f"- {line}." for line in readings),
        ]
    if reading := wand_reading(record):
        exits = record["wand"]["exit_fraction"]
        shares = ", ".join(f"stage {stage} {percent(part)}" for stage, part in enumerate(exits))
        safety = number(record["wand"].get("safety"), 2)
        lines += ["", f"WAND early exit at safety {safety}: {shares}. {reading}"]
    return "\n".join(lines)


def baselines(record: Record) -> str:
    """The compressor baselines beside the model."""
    baseline = record.get("baseline") or {}
    if not baseline:
        return ""
    rows = [
        ("this model", number(record["bpb"]["full"])),
        ("xz, primed with training text", number(baseline.get("xz_primed_bpb"))),
        ("xz", number(baseline.get("xz_bpb"))),
    ]
    text = "The same validation text under a general-purpose compressor."
    return f"## Baselines\n\n{text}\n\n{markdown_table(('compressor', 'bits per byte'), rows)}"


def probes(record: Record) -> str:
    """Greedy continuations of one record, escaped."""
    probes = record.get("probes") or []
    if not probes:
        return ""
    blocks = []
    for place, probe in enumerate(probes, start=1):
        prompt, expected = (markdown_text(probe.get(key, "")) for key in ("prompt", "expected"))
        continuation = markdown_text(probe.get("continuation", ""), 400)
        blocks.append(
            f"{place}. **{prompt}** (expected: {expected}; graded: {verdict(probe, markdown_text)})\n\n"
            f"   {continuation or '(nothing)'}"
        )
    text = "Greedy continuations, as the model wrote them; markup and control characters are escaped."
    return "\n\n".join([f"## Probes at step {count(record['step'])}", text, *blocks])


def source_rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of a data manifest with documents and bytes by split: a manifest's totals hold both."""
    rows = []
    for item in data.get("sources") or []:
        if isinstance(item, Mapping):
            row = {key: value for key, value in item.items() if key not in ("documents", "bytes")}
            for key in ("documents", "bytes"):
                held = row.pop(f"val_{key}", 0) or 0
                total = item.get(key)
                row[f"training_{key}"] = total - held if isinstance(total, int) else None
                row[f"validation_{key}"] = held
            rows.append(row)
    return rows


def validation_text(validation: Mapping[str, Any]) -> str:
    """What the slice is made of: whole held-out documents, a sample, or pieces where documents were too few."""
    number_of = count(validation.get("documents"))
    sampled = bool(validation.get("sampled"))
    if validation.get("unit") == "piece":
        return f"{number_of} pieces of {'a sample of ' if sampled else ''}documents held out from training"
    if sampled:
        return f"a sample of {number_of} documents held out from training, long ones cut"
    return f"{number_of} documents held out whole"
