"""What a card or report says in words of a record's figures: each sentence is made from a sign and an interval alone.

Nothing else in a card or report states an order of two figures, so that no text can contradict its record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cognica_poe.release.text import count, number, percent, signed

Record = Mapping[str, Any]
"""An analysis record in its JSON layout."""
UNCLEAR = "no difference seen"
POOL = "the full pool"
_FEW = 5e-4  # bits per byte: with a bound below it four decimals would hide the interval


@dataclass(frozen=True)
class Comparison:
    """The full pool against another use of the same weights; ``value``, ``low``, ``high``: BPB of pool minus other."""

    role: str
    """``deepest stage``, ``best stage`` or ``best prefix``."""
    other: str
    value: float
    low: float
    high: float

    @property
    def digits(self) -> int:
        """Decimals that show the interval."""
        return 4 if min(abs(self.low), abs(self.high)) >= _FEW else 6

    @property
    def reading(self) -> str:
        """Which of the two is better and by how much, or that none is seen to be."""
        if self.low <= 0.0 <= self.high:
            return f"{UNCLEAR}, {self.figures}"
        pool_wins = self.high < 0.0
        value, low, high = (-self.value, -self.high, -self.low) if pool_wins else (self.value, self.low, self.high)
        winner = POOL if pool_wins else self.other
        verb = "are" if winner.endswith("stages") else "is"
        shown = [number(part, self.digits) for part in (value, low, high)]
        return f"{winner} {verb} better, by {shown[0]} [{shown[1]}, {shown[2]}]"

    @property
    def figures(self) -> str:
        """Pool minus other with its interval, signed."""
        value, low, high = (signed(part, self.digits) for part in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def comparisons(record: Record) -> list[Comparison]:
    """Pool against deepest stage, best stage and best prefix, where measured; none for a single stage.

    Best means fewest bits per byte on the same text; of equals the one of fewer layers.
    """
    gaps, bpb = record.get("gaps") or {}, record["bpb"]
    stages, prefixes = gaps.get("stage") or [], gaps.get("prefix") or []
    if len(stages) < 2:
        return []
    best = min(range(len(stages)), key=lambda k: bpb["stage"][k])
    found = [("deepest stage", f"stage {len(stages) - 1} alone", stages[-1]),
             ("best stage", f"stage {best} alone", stages[best])]  # fmt: skip
    if prefixes:
        best = min(range(len(prefixes)), key=lambda k: bpb["prefix"][k])
        found.append(("best prefix", prefix_name(best), prefixes[best]))
    return [Comparison(role, other, gap["value"], gap["low"], gap["high"]) for role, other, gap in found]


def prefix_name(last: int) -> str:
    """The pool of the stages 0..last, in words."""
    return f"the first {last + 1} stages" if last else "stage 0 alone"


def gap_lines(record: Record) -> list[str]:
    """One sentence per comparison; bits per byte, paired over documents."""
    return [f"{item.role} ({item.other}): {item.reading}" for item in comparisons(record)]


def wand_reading(record: Record) -> str:
    """Where tokens leave early, and whether that pays; empty for one stage."""
    wand = record.get("wand") or {}
    exits = wand.get("exit_fraction") or []
    if len(exits) < 2:
        return ""
    early = 1.0 - exits[-1]
    if early <= 0.0:
        if record.get("speeds"):
            return f"No token leaves early at these bounds. {_pays(record)}"
        return "No token leaves early at these bounds: WAND saves nothing here."
    return (
        f"{percent(early)} of {count(wand.get('positions'))} tokens leave before the last stage, and "
        f"{percent(wand.get('agreement'), 2)} of all tokens are the full pool's. {_pays(record)}"
    )


def _pays(record: Record) -> str:
    """Whether WAND was timed, and what sign and interval of its gain say."""
    timed = next((item for item in record.get("speeds") or [] if item["mode"] == "wand"), None)
    if timed is None:
        return "Whether that saves time is not part of this record: `cognica-poe analyze --speed` times it."
    if timed["low"] > 1.0:
        word = "It pays here"
    elif timed["high"] < 1.0:
        word = "It does not pay here"
    else:
        word = "No gain is seen here"
    return f"{word}: {speed_figures(timed)} of plain decoding's speed."


def speed_figures(timed: Mapping[str, Any]) -> str:
    """``0.80x [0.59, 0.95]``."""
    return f"{number(timed['ratio'], 2)}x [{number(timed['low'], 2)}, {number(timed['high'], 2)}]"


def routing_reading(record: Record) -> str:
    """Whether the cap of the routing probe says anything; empty where it was not measured."""
    routing = record.get("routing") or {}
    if not routing:
        return ""
    fraction, rate = routing.get("fraction"), routing.get("regression_rate")
    cap = percent(routing.get("cap"), 1)
    if fraction == 1.0:
        return (
            f"The cap of {cap} never binds at step {count(record['step'])}: with every position routed "
            f"{percent(rate, 2)} regress. The share and its speed-up then say that stage 0 seldom loses a token, not "
            "that its margin tells which."
        )
    if fraction == 0.0:
        return f"At step {count(record['step'])} no position can be routed within the cap of {cap}."
    return f"At step {count(record['step'])} the cap of {cap} binds: {percent(fraction, 2)} of positions are routed."
