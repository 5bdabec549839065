"""The measured tables of a card: one function per section, each a pure function of analysis records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cognica_poe.release.card.capabilities import verdict
from cognica_poe.release.card.readings import Record, comparisons, gap_lines, routing_reading, wand_reading
from cognica_poe.release.text import MISSING, count, interval, markdown_table, markdown_text, number, percent, signed


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


def measurements(record: Record) -> str:
    """Every path of one record, its crossover gap and its early exits."""
    rows = [
        (f"**{path}**" if path == trained_path(record) else path, number(bpb), interval(bounds), percent(accuracy, 2))
        for path, bpb, bounds, accuracy in bpb_rows(record)
    ]
    header = ("path", "bits per byte", "95 % interval", "next-token accuracy")
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


def pool_against_parts(records: Sequence[Record]) -> str:
    """The full pool minus deepest stage, best stage and best prefix, per record; empty for one stage."""
    rows = []
    for record in records:
        found = {item.role: item for item in comparisons(record)}
        if found:
            deepest, stage, prefix = (found.get(role) for role in ("deepest stage", "best stage", "best prefix"))
            rows.append(
                [count(record["step"]), deepest.figures if deepest else MISSING]
                + [f"{item.other}: {item.figures}" if item else MISSING for item in (stage, prefix)]
            )
    if not rows:
        return ""
    header = ("step", "minus deepest stage", "minus best stage", "minus best prefix")
    text = (
        "Bits per byte of the full pool minus those of another use of the same weights, with paired 95 % intervals. "
        "An interval below zero speaks for the pool, one above zero for the other, one that holds zero for neither."
    )
    return f"## The pool against its parts\n\n{text}\n\n{markdown_table(header, rows, 'r' * len(header))}"


def trajectory(records: Sequence[Record], release: Mapping[str, Any]) -> str:
    """One line per record on the trained path."""
    revisions = release.get("revisions") or {}
    stages = stage_count(records[-1])
    header = ["step", "tokens", "bits per byte", "95 % interval", "change"]
    header += [f"stage {k}" for k in range(stages)] if stages > 1 else []
    header += ["accuracy"] + (["commit"] if revisions else [])
    rows = []
    for record in records:
        bpb = record["bpb"]
        row = [count(record["step"]), count(record.get("tokens_seen")), number(bpb["full"])]
        row += [interval((record.get("intervals") or {}).get("full")), _change(record)]
        row += [number(value) for value in bpb["stage"]] if stages > 1 else []
        row += [percent((record.get("accuracy") or {}).get("full"), 2)]
        rows.append(row + ([f"`{revisions[record['step']][:12]}`" if record["step"] in revisions else MISSING]
                           if revisions else []))  # fmt: skip
    note = "A change is a signal when its paired 95 % interval excludes zero, else noise."
    note += " Stages are bits per byte." if stages > 1 else ""
    return f"## Trajectory\n\n{markdown_table(header, rows, 'r' * len(header))}\n\n{note}"


def _change(record: Record) -> str:
    delta = record.get("delta")
    if not delta:
        return MISSING
    return f"{signed(delta.get('full'))} ({'signal' if delta.get('signal') else 'noise'})"


def bounds(records: Sequence[Record]) -> str:
    """WAND bounds and exits per record; empty for one stage."""
    if not records[-1].get("wand_bounds"):
        return ""
    width = len(records[-1]["wand_bounds"])
    header = ["step", *(f"stage {k} to {k + 1}" for k in range(width)), "exit at stage 0", "agreement"]
    rows = []
    for record in records:
        wand, bounds = record.get("wand") or {}, record.get("wand_bounds") or [None] * width
        exits = wand.get("exit_fraction") or [None]
        row = [count(record["step"]), *(number(bound) for bound in bounds), percent(exits[0])]
        rows.append([*row, percent(wand.get("agreement"), 2)])
    text = (
        "99th percentile of how far one more stage can move the pooled log-probabilities, measured at this step and "
        "stored in its `config.json` (`poe_wand_p99_bounds_per_stage_head`), in nats."
    )
    return f"## WAND bounds\n\n{text}\n\n{markdown_table(header, rows, 'r' * len(header))}"


def speculation(records: Sequence[Record]) -> str:
    """Acceptance per record; empty where nothing was drafted."""
    measured = [record for record in records if (record.get("speculative") or {}).get("proposed")]
    if not measured:
        return ""
    header = (
        "step",
        "acceptance",
        "95 % interval",
        "accepted",
        "proposed",
        "rounds",
        "draft stage",
        "draft length",
        "prompts",
        "tokens each",
    )
    rows = []
    for record in measured:
        it = record["speculative"]
        row = [count(record["step"]), percent(it.get("acceptance"), 2)]
        row.append(interval((it.get("low"), it.get("high")), 3))
        keys = ("accepted", "proposed", "rounds", "draft_stage", "k_draft", "prompts", "new_tokens")
        rows.append(row + [count(it.get(key)) for key in keys])
    text = (
        "Acceptance is accepted over proposed draft tokens, behind the openings of held-out documents; other openings "
        "and lengths give other figures. The interval is over these prompts. Greedy output equals that of `generate`."
    )
    return f"## Self-speculative decoding\n\n{text}\n\n{markdown_table(header, rows, 'r' * len(header))}"


def routing(records: Sequence[Record]) -> str:
    """Confidence routing per record; empty where it was not measured."""
    measured = [record for record in records if record.get("routing")]
    if not measured or stage_count(records[-1]) < 2:
        return ""
    header = ("step", "allowed regressions", "regressions", "routed to stage 0", "projected speed-up", "positions")
    rows = []
    for record in measured:
        it = record["routing"]
        row = [count(record["step"]), percent(it.get("cap"), 1), percent(it.get("regression_rate"), 2)]
        row += [
            percent(it.get("fraction"), 2) + (" (cap never binds)" if it.get("fraction") == 1.0 else ""),
            number(it.get("projected_speedup"), 3),
            count(it.get("positions")),
        ]
        rows.append(row)
    text = (
        "Share of positions that stage 0 may answer alone when its margin is large, at a capped rate of tokens the "
        "full pool would have got right. The speed-up is projected from layer and head costs, not timed. "
        f"{routing_reading(measured[-1])}"
    )
    return f"## Confidence routing\n\n{text}\n\n{markdown_table(header, rows, 'r' * len(header))}"


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
    rows = [
        (
            markdown_text(probe.get("prompt", "")),
            markdown_text(probe.get("continuation", ""), 400),
            markdown_text(probe.get("expected", "")),
            markdown_text(verdict(probe), 60),
        )
        for probe in probes
    ]
    text = "Greedy continuations, as the model wrote them; markup and control characters are escaped."
    table = markdown_table(("prompt", "continuation", "expected", "graded"), rows, "llll")
    return f"## Probes at step {count(record['step'])}\n\n{text}\n\n{table}"


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
