"""The tables of a card over steps: one function per section, each a pure function of a trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cognica_poe.release.card.diversity import diversity
from cognica_poe.release.card.findings import cumulative, milestone_table
from cognica_poe.release.card.readings import Record, comparisons, routing_reading, speed_figures
from cognica_poe.release.card.section import Section, over_steps
from cognica_poe.release.card.tables import stage_count
from cognica_poe.release.card.uses import uses
from cognica_poe.release.text import MISSING, count, interval, number, percent
from cognica_poe.release.trajectory import Row, Trajectory


def sections(trajectory: Trajectory, release: Mapping[str, Any]) -> list[Section]:
    """Every table over steps that the records have figures for, and those of the last record's cheaper uses."""
    found = [
        trajectory_table(trajectory, release),
        cumulative(trajectory),
        milestone_table(trajectory),
        accuracy(trajectory),
        pool_against_parts(trajectory),
        bounds(trajectory),
        speculation(trajectory),
        routing(trajectory),
        speeds(trajectory),
        *uses(trajectory.records[-1]),
        *diversity(trajectory),
    ]
    return [section for section in found if section is not None]


def trajectory_table(trajectory: Trajectory, release: Mapping[str, Any]) -> Section:
    """Bits per byte by step on the trained path, with the change since the record before."""
    revisions = release.get("revisions") or {}
    stages = stage_count(trajectory.records[-1])
    header = ["tokens", "bits per byte", "95 % interval", "change", "since"]
    header += [f"stage {k}" for k in range(stages)] if stages > 1 else []
    header += ["commit"] if revisions else []

    def cells(row: Row, record: Record) -> list[str]:
        bpb = record["bpb"]
        found = [count(record.get("tokens_seen")), number(bpb["full"])]
        found += [interval((record.get("intervals") or {}).get("full")), row.change("bpb.full"), row.since]
        found += [number(value) for value in bpb["stage"]] if stages > 1 else []
        commit = revisions.get(row.step)
        return found + ([commit[:12] if commit else MISSING] if revisions else [])

    return over_steps("Trajectory", "", header, trajectory, cells, "bpb")


def accuracy(trajectory: Trajectory) -> Section | None:
    """Next-token accuracy by stage, with changes."""
    latest = trajectory.records[-1]
    if not latest.get("accuracy"):
        return None
    stages = stage_count(latest) if stage_count(latest) > 1 else 0
    header = ["trained path", *(f"stage {k}" for k in range(stages)), "since"]

    def cells(row: Row, record: Record) -> list[str]:
        shares = record.get("accuracy") or {}
        by_stage = shares.get("stage") or [None] * stages
        found = [("accuracy.full", shares.get("full"))]
        found += [(f"accuracy.stage{k}", by_stage[k]) for k in range(stages)]
        return [*(_with_change(percent(value, 2), row.change(name, 100.0, 2)) for name, value in found), row.since]

    text = "Share of held-out tokens whose most likely prediction is right; changes in percentage points."
    return over_steps("Accuracy by stage", text, header, trajectory, cells, "accuracy")


def _with_change(value: str, change: str) -> str:
    return value if change == MISSING else f"{value} ({change})"


def pool_against_parts(trajectory: Trajectory) -> Section | None:
    """The full pool minus deepest stage, best stage and best prefix; None for one stage."""
    if not any(comparisons(record) for record in trajectory.records):
        return None

    def cells(_: Row, record: Record) -> list[str]:
        found = {item.role: item for item in comparisons(record)}
        deepest, stage, prefix = (found.get(role) for role in ("deepest stage", "best stage", "best prefix"))
        rest = [f"{item.other}: {item.figures}" if item else MISSING for item in (stage, prefix)]
        return [deepest.figures if deepest else MISSING, *rest]

    header = ["minus deepest stage", "minus best stage", "minus best prefix"]
    text = (
        "Bits per byte of the full pool minus those of another use of the same weights, with paired 95 % intervals. "
        "An interval below zero speaks for the pool, one above zero for the other, one that holds zero for neither."
    )
    return over_steps("The pool against its parts", text, header, trajectory, cells)


def bounds(trajectory: Trajectory) -> Section | None:
    """WAND bounds and exits; None for one stage."""
    width = len(trajectory.records[-1].get("wand_bounds") or [])
    if not width:
        return None
    header = [*(f"stage {k} to {k + 1}" for k in range(width)), "since"]
    header += [*(f"exit {k}" for k in range(width + 1)), "agreement", "positions"]

    def cells(row: Row, record: Record) -> list[str]:
        wand, limits = record.get("wand") or {}, record.get("wand_bounds") or [None] * width
        exits = wand.get("exit_fraction") or [None] * (width + 1)
        values = [_with_change(number(bound), row.change(f"bounds.{k}")) for k, bound in enumerate(limits)]
        found = [*values, row.since, *(percent(part) for part in exits)]
        return [*found, percent(wand.get("agreement"), 2), count(wand.get("positions"))]

    text = (
        "99th percentile of how far one more stage can move the pooled log-probabilities, measured at this step and "
        "stored in its config.json as poe_wand_p99_bounds_per_stage_head, in nats. Exits: where tokens leave."
    )
    return over_steps("WAND bounds", text, header, trajectory, cells, "bounds")


def speculation(trajectory: Trajectory) -> Section | None:
    """Acceptance; None where nothing was drafted."""
    if not any((record.get("speculative") or {}).get("proposed") for record in trajectory.records):
        return None
    header = ["acceptance", "95 % interval", "change", "since", "accepted", "proposed", "rounds", "draft stage"]
    header += ["draft length", "prompts", "tokens each"]
    keys = ("accepted", "proposed", "rounds", "draft_stage", "k_draft", "prompts", "new_tokens")

    def cells(row: Row, record: Record) -> list[str]:
        it = record.get("speculative") or {}
        found = [percent(it.get("acceptance"), 2), interval((it.get("low"), it.get("high")), 3)]
        return [*found, row.change("acceptance", 100.0, 2), row.since, *(count(it.get(key)) for key in keys)]

    text = (
        "Acceptance is accepted over proposed draft tokens, behind the openings of held-out documents; other openings "
        "and lengths give other figures. The interval is over these prompts, the change in percentage points. Greedy "
        "output is that of plain decoding."
    )
    return over_steps("Self-speculative decoding", text, header, trajectory, cells, "acceptance")


def routing(trajectory: Trajectory) -> Section | None:
    """Confidence routing; None where it was not measured."""
    measured = [record for record in trajectory.records if record.get("routing")]
    if not measured or stage_count(measured[-1]) < 2:
        return None
    header = ["allowed regressions", "regressions", "routed to stage 0", "change", "since", "projected speed-up"]

    def cells(row: Row, record: Record) -> list[str]:
        it = record.get("routing") or {}
        found = [percent(it.get("cap"), 1), percent(it.get("regression_rate"), 2), routed(record)]
        change = row.change("routing", 100.0, 2)
        return [*found, change, row.since, number(it.get("projected_speedup"), 3), count(it.get("positions"))]

    text = (
        "Share of positions that stage 0 may answer alone when its margin is large, at a capped rate of tokens the "
        "full pool would have got right; changes in percentage points. The speed-up is projected from layer and head "
        f"costs, not timed. {routing_reading(measured[-1])}"
    )
    return over_steps("Confidence routing", text, [*header, "positions"], trajectory, cells, "routing")


def routed(record: Record) -> str:
    """The routed share, and that it says nothing where the cap never binds."""
    fraction = (record.get("routing") or {}).get("fraction")
    return percent(fraction, 2) + (" (cap never binds)" if fraction == 1.0 else "")


def speeds(trajectory: Trajectory) -> Section | None:
    """Measured speed by mode; None where nothing was timed."""
    modes: list[str] = []
    for record in trajectory.records:
        modes += [item["mode"] for item in record.get("speeds") or [] if item["mode"] not in modes]
    if not modes:
        return None

    def cells(_: Row, record: Record) -> list[str]:
        found = {item["mode"]: item for item in record.get("speeds") or []}
        first = next(iter(found.values()), None)
        where = f"{first['device']}, {first['dtype']}" if first else MISSING
        return [*(speed_figures(found[mode]) if mode in found else MISSING for mode in modes), where]

    text = (
        "Times the speed of plain cached decoding, with 95 % intervals over the probe prompts; timed in turn on one "
        "machine. An interval above 1 is a gain, one below 1 a loss, one that holds 1 neither."
    )
    return over_steps("Measured speed", text, [*modes, "on"], trajectory, cells)
