"""The tables of what the cheaper uses of one record give: leaving early by rule, drafts by length, routing by cap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cognica_poe.release.card.readings import Record, speed_figures
from cognica_poe.release.card.section import Section
from cognica_poe.release.text import MISSING, count, number, percent

RELEASED_COST = 0.51
"""Cost of stage 0 that the original release's speed-ups were projected with (it writes 1 / (1 - 0.49 f))."""


def uses(record: Record) -> list[Section]:
    """Those of the tables that ``record`` has figures for."""
    found = [leaving(record), drafts(record), routing_curve(record)]
    return [section for section in found if section is not None]


def leaving(record: Record) -> Section | None:
    """Every rule of early exit; None where none was calibrated."""
    rules = record.get("exit_rules") or []
    if not rules:
        return None
    wand, stages = record.get("wand") or {}, len(rules[0].get("margins") or []) + 1
    sums = _remaining(record.get("wand_bounds") or [], wand.get("safety") or 1.0)
    rows = [_rule("WAND bounds", sums, wand, _speed(record, "wand"), stages)]
    for rule in rules:
        stated = rule.get("stated")
        name = "direct p99 bounds" if stated is None else f"{100 * stated:g} % agreement"
        mode = "direct" if stated is None else f"{stated:g}"
        rows.append(_rule(name, rule.get("margins"), rule, _speed(record, f"wand {mode}"), stages))
    text = (
        f"At step {count(record['step'])} a token leaves after a stage when the first two tokens of its pool are "
        "further apart than the margin, in nats. WAND adds up bounds of the stages that remain; direct bounds are "
        "those of the whole remaining change; an agreement is kept by the smallest margins that text which is "
        "counted by documents shows to keep it, with 95 % confidence. Exits and agreement with the full pool are of "
        "documents that did not calibrate them, at teacher-forced positions. Speed is measured, against plain "
        "decoding. The margins stand in config.json: generate_wand(ids, guarantee=0.99)."
    )
    header = ["rule", *(f"margin {k}" for k in range(stages - 1)), *(f"exit {k}" for k in range(stages))]
    return Section("Early exit by rule", text, [*header, "agreement", "at least", "speed"], rows, first_is_words=True)


def _remaining(bounds: list[float], safety: float) -> list[float]:
    return [safety * sum(bounds[k:]) for k in range(len(bounds))]


def _rule(name: str, margins: list[float] | None, found: Mapping[str, Any], speed: str, stages: int) -> list[str]:
    exits = found.get("exit_fraction") or [None] * stages
    return [
        name,
        *(number(margins[k] if margins else None, 3) for k in range(stages - 1)),
        *(percent(part) for part in exits),
        percent(found.get("agreement"), 2),
        percent(found.get("low"), 2),
        speed,
    ]


def _speed(record: Record, mode: str) -> str:
    timed = next((item for item in record.get("speeds") or [] if item["mode"] == mode), None)
    return speed_figures(timed) if timed else MISSING


def drafts(record: Record) -> Section | None:
    """Acceptance by draft length, and the original's protocol; None where it was not measured."""
    found = record.get("drafts")
    if not found:
        return None
    rows = [
        _length(str(item["k_draft"]), item, found, number(item.get("tokens_per_round"), 2)) for item in found["lengths"]
    ]
    if probes := found.get("probes"):
        rows.append(_length(f"{probes['k_draft']}, probe prompts", probes, probes, MISSING))
    text = (
        f"At step {count(record['step'])} stage {found['draft_stage']} drafts behind {count(found['prompts'])} places "
        f"spread over all held-out text, each behind {found['context']} tokens of its document. Intervals are over "
        f"{count(found['documents'])} documents or files. The last row is the original's protocol, whose interval is "
        "over its prompts."
    )
    header = ["draft length", "acceptance", "95 % interval", "accepted", "proposed", "tokens per pass"]
    return Section("Acceptance by draft length", text, [*header, "prompts", "tokens each"], rows, first_is_words=True)


def _length(name: str, item: Mapping[str, Any], where: Mapping[str, Any], per_pass: str) -> list[str]:
    bounds = (
        f"[{number(item.get('low'), 3)}, {number(item.get('high'), 3)}]" if item.get("low") is not None else MISSING
    )
    counts = [count(item.get("accepted")), count(item.get("proposed")), per_pass]
    return [
        name,
        percent(item.get("acceptance"), 2),
        bounds,
        *counts,
        count(where["prompts"]),
        count(where["new_tokens"]),
    ]


def routing_curve(record: Record) -> Section | None:
    """Share routed by cap in every reading, with projected and measured speed; None where there is no curve."""
    routing = record.get("routing") or {}
    curve = routing.get("curve") or []
    if not curve:
        return None
    readings = list(dict.fromkeys((point["counted"], point["of"]) for point in curve))
    by_cap: dict[float, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for point in curve:
        by_cap.setdefault(point["cap"], {})[point["counted"], point["of"]] = point
    stage0 = next((item for item in record.get("speeds") or [] if item["mode"] == "stage 0"), None)
    costs = [routing["stage0_cost"], RELEASED_COST, *([1.0 / stage0["ratio"]] if stage0 else [])]
    rows = []
    for cap, points in by_cap.items():
        first = points.get(("lost", "routed")) or {}
        cells = [_share(points.get(reading)) for reading in readings]
        cells.append(percent(first.get("tested_rate"), 2))
        cells += [f"{number(_projected(first.get('fraction'), min(cost, 1.0)), 2)}x" for cost in costs]
        rows.append([percent(cap), *cells, _speed(record, f"wand routed {cap:g}")])
    names = [f"{'lost' if counted == 'lost' else 'net loss'} of {of}" for counted, of in readings]
    header = ["cap", *names, "tested loss", f"at {number(costs[0], 3)}", f"at {RELEASED_COST}"]
    header += [f"at {number(costs[2], 3)}"] if stage0 else []
    timed = f", and {number(costs[2], 3)} as timed here" if stage0 else ""
    text = (
        f"At step {count(record['step'])}: the largest share of positions, from the widest margin of stage 0 on, "
        "within a cap on regressions, with 95 % intervals over documents. Lost: the full pool is right and stage 0 "
        "wrong; net: less what only stage 0 has right; per routed or per all positions. Tested loss: of thresholds "
        "that other documents chose, in the first reading. Speed-ups are projected from that reading for a stage 0 "
        f"of cost {number(costs[0], 3)} (counted from parameters), {RELEASED_COST} (the original's){timed}; speed is "
        "measured, with stage 0 answering what is routed."
    )
    return Section("Routing by cap", text, [*header, "speed"], rows)


def _share(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return MISSING
    low, high = point.get("low"), point.get("high")
    bounds = "" if low is None else f" [{number(100 * low, 1)}, {number(100 * float(high or 0.0), 1)}]"
    return f"{percent(point['fraction'])}{bounds}"


def _projected(fraction: float | None, cost: float) -> float | None:
    return None if fraction is None else 1.0 / (1.0 - (1.0 - cost) * fraction)
