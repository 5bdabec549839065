"""A trajectory that others published, as data: partial rows, and what their sample sizes imply.

Nothing is filled in: what a table does not hold is missing. Without sums per document the intervals are binomial, of
one figure alone and of unpaired changes, and only where a sample size is given; what has none gets no interval.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cognica_poe.analysis.changes import holm
from cognica_poe.errors import UserError
from cognica_poe.files import atomic_folder, require_replaceable, safe_name, sha256_file, verify_manifest
from cognica_poe.seals import read_sealed, write_sealed

FILE = "trajectory.json"
KIND = "trajectory"
LEVEL, Z = 0.05, 1.959964
_COLUMNS = {  # key of a row: what a table may call it; a group is the stage
    "tokens_seen": r"tokens(?:_seen)?",
    "validation_bpb": r"train_log_val_bpb|validation_bpb",
    "bpb": r"slice_full_bpb|bpb|bpb_full",
    "bpb_stage": r"bpb_(?:stage|s)(\d+)",
    "accuracy": r"acc_full|accuracy",
    "accuracy_stage": r"(?:acc_s|accuracy_stage)(\d+)",
    "acceptance": r"spec_acceptance|acceptance",
    "speed_up": r"spec_speedup",
    "wand_bounds": r"wand_(\d+)_\d+|wand_bounds(\d+)",
    "routed": r"routed_fraction|routed",
    "routed_speed_up": r"routing_speedup",
}
_SHARES = {"accuracy", "accuracy_stage", "acceptance", "routed"}
_SIZE_OF = {"accuracy": "tokens", "accuracy_stage": "tokens", "acceptance": "drafts", "routed": "positions"}
_IGNORED = re.compile(
    r"revision|commit|weights_sha256|parameters|path|validation_sha256|of_training|epoch|shard|lr_scale|drafts"
    r"|crossover_gap|bpb_plain|bpb_prefix\d+|wand_exit_fraction\d+|.*_(?:low|high)"
)
"""Columns of our own ``trajectory.csv`` that a partial row does not hold."""
MOST_ROWS, MOST_BYTES = 100_000, 100_000_000


@dataclass(frozen=True)
class Sizes:
    """How many draws a figure stands on; None where that is not known."""

    tokens: int | None = None
    """Tokens that accuracy was counted on."""
    drafts: int | None = None
    """Draft tokens that acceptance was counted on, per step."""
    positions: int | None = None
    """Positions that the routed share was counted on."""


@dataclass(frozen=True)
class Published:
    """A published trajectory. ``rows``: by step, each a mapping with the keys of a line, None for what is missing."""

    name: str
    source: str
    """Name of the table that it was read from."""
    source_sha256: str
    sizes: Sizes
    rows: list[dict[str, Any]]

    @property
    def last(self) -> int:
        """The last step."""
        step: int = self.rows[-1]["step"]
        return step


@dataclass(frozen=True)
class Step:
    """A change between neighbouring steps that both hold the figure, with its unpaired 95 % interval."""

    since: int
    step: int
    value: float
    low: float
    high: float
    p: float
    survives: bool
    """Its p-value holds Holm's correction for all changes of the figure."""

    @property
    def noise(self) -> bool:
        """Whether its own interval holds zero."""
        return self.low <= 0.0 <= self.high


def import_table(table: Path, out: Path, name: str, sizes: Sizes) -> Published:
    """Read ``table`` (CSV) and keep it in the folder ``out``.

    Raises UserError: a column or a value that it does not know, naming it, a step twice, or an ``out`` that holds
    something else.
    """
    table = Path(table)
    require_replaceable(out, KIND)
    try:
        if table.stat().st_size > MOST_BYTES:
            raise UserError(f"{table} has more than {MOST_BYTES / 1e6:.0f} MB: it is no table of checkpoints")
        text = table.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"table not found: {table}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is no text in UTF-8: pass a CSV file") from error
    rows = parse_table(text, str(table))
    found = Published(safe_name(name, "--name"), table.name, sha256_file(table), sizes, rows)
    with atomic_folder(out, KIND) as folder:
        write_sealed(folder / FILE, asdict(found))
    return found


def parse_table(text: str, where: str) -> list[dict[str, Any]]:
    """Partial rows of a CSV text, by step. Raises UserError naming ``where``."""
    try:
        lines = [line for line in csv.reader(io.StringIO(text), strict=True) if line]
    except csv.Error as error:
        raise UserError(f"{where} is no CSV: {error}") from error
    if len(lines) < 2 or len(lines) > MOST_ROWS:
        raise UserError(f"{where} has {max(0, len(lines) - 1)} rows: a trajectory has 1 to {MOST_ROWS:,}")
    header = [cell.strip() for cell in lines[0]]
    if len(set(header)) < len(header):
        raise UserError(f"{where} names a column twice")
    places = [_place(name, where) for name in header]
    if ("step", None) not in places:
        raise UserError(f"{where} has no column step")
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise UserError(f"{where} line {number} has {len(line)} cells, the first line {len(header)}")
        row = _row(zip(header, places, line, strict=True), f"{where} line {number}")
        if row["step"] in rows:
            raise UserError(f"{where} line {number}: step {row['step']} is there twice")
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _place(name: str, where: str) -> tuple[str, int | None] | None:
    """Key and stage of a column; None for one that is passed over."""
    if name == "step":
        return name, None
    for key, pattern in _COLUMNS.items():
        if found := re.fullmatch(pattern, name):
            stage = next((group for group in found.groups() if group is not None), None)
            if stage is not None and int(stage) > 1000:
                break
            return key, None if stage is None else int(stage)
    if _IGNORED.fullmatch(name):
        return None
    known = ", ".join(("step", *(pattern.replace(r"(\d+)", "K").replace(r"\d+", "K") for pattern in _COLUMNS.values())))
    raise UserError(f"{where}: unknown column {name[:60]!r}; columns are {known.replace('(?:', '(')}")


def _row(cells: Any, where: str) -> dict[str, Any]:
    row: dict[str, Any] = {"step": None, **dict.fromkeys(_COLUMNS)}
    by_stage: dict[str, dict[int, float]] = {}
    for name, place, cell in cells:
        if place is None or not cell.strip():
            continue
        key, stage = place
        value = _number(key, cell.strip(), f"{where}: {name}")
        if stage is None:
            row[key] = value
        else:
            by_stage.setdefault(key, {})[stage] = value
    if row["step"] is None:
        raise UserError(f"{where} has no step")
    for key, values in by_stage.items():
        row[key] = [values.get(k) for k in range(max(values) + 1)]
    return row


def _number(key: str, cell: str, where: str) -> Any:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    whole = key in ("step", "tokens_seen")
    low, high = 0.0, 1.0 if key in _SHARES else 2.0**53
    if not low <= value <= high or (whole and value != int(value)):
        kind = "a share from 0 to 1" if key in _SHARES else f"a {'whole ' if whole else ''}number, 0 or more"
        raise UserError(f"{where} is {cell[:40]!r}: it must be {kind}, or empty")
    return int(value) if whole else value


def is_published(path: Path) -> bool:
    """Whether a folder holds an imported trajectory."""
    return (Path(path) / FILE).is_file()


def read_published(path: Path) -> Published:
    """An imported trajectory. Raises UserError for a file that was changed."""
    verify_manifest(path)
    kept = read_sealed(Path(path) / FILE, "imported trajectory", "import the table again")
    return Published(**{**kept, "sizes": Sizes(**kept["sizes"])})


def share_interval(share: float, number: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``number`` independent draws."""
    middle = (share + Z * Z / (2 * number)) / (1 + Z * Z / number)
    half = Z / (1 + Z * Z / number) * math.sqrt(share * (1 - share) / number + Z * Z / (4 * number * number))
    return max(0.0, middle - half), min(1.0, middle + half)


def size_of(published: Published, key: str) -> int | None:
    """Draws behind a share; None where that is not known or the figure is no share."""
    number: int | None = getattr(published.sizes, _SIZE_OF[key]) if key in _SIZE_OF else None
    return number


def steps_of(published: Published, key: str, stage: int | None = None) -> list[Step]:
    """Every change of a share between neighbouring rows that hold it; none without its sample size."""
    number = size_of(published, key)
    values = [(row["step"], value) for row in published.rows if (value := value_of(row, key, stage)) is not None]
    if not number:
        return []
    found = []
    for (since, before), (step, after) in itertools.pairwise(values):
        error = math.sqrt((before * (1 - before) + after * (1 - after)) / number)
        change = after - before
        p = math.erfc(abs(change) / error / math.sqrt(2)) if error else float(change == 0.0)
        found.append((since, step, change, change - Z * error, change + Z * error, p))
    adjusted = holm(item[-1] for item in found)
    return [Step(*item, survives=p <= LEVEL) for item, p in zip(found, adjusted, strict=True)]


def value_of(row: Mapping[str, Any], key: str, stage: int | None = None) -> float | None:
    """A figure of a row, None where it is missing."""
    value = row.get(key)
    if stage is not None:
        value = value[stage] if isinstance(value, Sequence) and stage < len(value) else None
    return value


FIGURES = (("acceptance", "acceptance"), ("accuracy", "accuracy"), ("routed", "routed share"))
"""Shares whose changes are read: key and words."""
_SAME_TEXT = ("accuracy", "routed")


def readings(published: Published) -> list[str]:
    """Which changes between neighbouring checkpoints are noise at these sample sizes; plain text."""
    lines, paired = [], ", and on the same text at every step a paired one is narrower"
    for key, words in FIGURES:
        steps = steps_of(published, key)
        if not steps:
            continue
        noise, kept = [step for step in steps if step.noise], sum(step.survives for step in steps)
        lines.append(
            f"{len(noise)} of {len(steps)} changes of {words} between neighbouring checkpoints are noise: their 95 % "
            f"intervals at {size_of(published, key):,} independent draws a step hold zero. {kept} of {len(steps)} hold "
            f"Holm's correction for {len(steps)} changes. Draws within one text are not independent, which makes true "
            f"intervals wider{paired if key in _SAME_TEXT else ''}."
        )
    return lines
