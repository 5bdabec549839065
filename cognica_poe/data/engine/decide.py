"""Stage ``decide``: where every document goes: a training shard, the validation shard, or nowhere, and why."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cognica_poe.data.cleaning.rules import DUPLICATE, NEAR_DUPLICATE
from cognica_poe.data.engine.groups import Column, Groups, assign_splits, find_groups
from cognica_poe.data.engine.job import Job, Outputs, Stage, Values
from cognica_poe.data.engine.keys import as_unit, read_array
from cognica_poe.errors import UserError

_DUPLICATE, _OVER, _NEAR = -1, -2, -3
REASONS = {_DUPLICATE: DUPLICATE, _OVER: "over max_bytes", _NEAR: NEAR_DUPLICATE}
"""Why a document goes nowhere, by the number that stands in the place of a shard's."""
_ENOUGH = 0.995  # of the text wanted of a source: a share of a third is reached within 0.2 points then
Columns = dict[str, Column]
_COLUMNS = ("group", "sample", "given", "source", "size", "shard")


class Decide(Stage):
    """One task. Writes ``.bin``: int32 per document in the order of the plan, the number of its shard, training shards
    first and validation last, or a reason below 0.

    Counts ``shards`` and ``val_shards``, ``bytes``, ``dropped`` (by source and reason), and for every reading task
    ``places``: the first document, one behind the last, and the sha256 of its numbers.
    """

    name = "decide"
    endings = (".bin",)

    def count(self, job: Job) -> int:
        return 1

    def parameters(self, job: Job, number: int) -> Values:
        options = job.plan["options"]
        names = ("val_fraction", "val_min_bytes", "max_bytes", "shard_bytes")
        return {**{name: options[name] for name in names}, "sizes": job.plan["sizes"], "given": job.plan["given"]}

    def needs(self, job: Job, number: int) -> Iterable[tuple[str, int]]:
        return [(stage, i) for stage in ("read", "duplicates", "near") for i in range(job.count(stage))]

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        columns, borders, names = _load(job)
        total = len(columns["size"])
        if not total:
            raise UserError(f"{job.plan['given']} holds no text at all; nothing was built")
        gone = [read_array(job.output("duplicates", i, ".npz"), "later") for i in range(job.count("duplicates"))]
        keep = np.ones(total, dtype=bool)
        near = read_array(job.output("near", 0, ".npz"), "later")
        keep[np.concatenate([*gone, near])] = False
        source = columns["source"]
        kept = {name: columns.pop(name)[keep] for name in list(columns)}  # one copy at a time: a column may be large
        groups = find_groups(*(kept[name] for name in ("group", "sample", "given", "source", "size")))
        options = job.plan["options"]
        try:
            wanted = _wanted(job.plan["sizes"], groups, names)
            limits = (options["val_fraction"], options["val_min_bytes"], options["max_bytes"], wanted)
            split = assign_splits(groups, *limits)[groups.of_document]
        except UserError as error:
            raise UserError(f"{job.plan['given']}: {error}") from error
        sizes, unit = kept["size"].astype(np.int64), as_unit(kept["shard"])
        size, shard_bytes = int(sizes.sum()), options["shard_bytes"]
        shards, held = (max(1, math.ceil(int(sizes[split == side].sum()) / shard_bytes)) for side in (0, 1))
        training, validation = ((n * unit).astype(np.int32) for n in (shards, held))
        target = np.full(total, _DUPLICATE, dtype=np.int32)
        target[near] = _NEAR
        target[keep] = np.where(split == 0, training, np.where(split == 1, shards + validation, _OVER))
        with out.write(".bin") as file:
            file.write(target.tobytes())
        places = [[a, b, _sha256(target[a:b])] for a, b in itertools.pairwise(borders)]
        dropped = _dropped(target, source, names)
        return {"shards": shards, "val_shards": held, "bytes": size, "dropped": dropped, "places": places}


def _wanted(sizes: dict[str, int] | None, groups: Groups, names: list[str]) -> Column | None:
    """Bytes of every source that a mix asks for. Raises UserError where the files read hold too little of one."""
    if sizes is None:
        return None
    held = np.bincount(groups.source, weights=groups.bytes, minlength=len(names))
    found = dict(zip(names, held.tolist(), strict=True))
    for name, size in sizes.items():
        if (reached := found.get(name, 0.0)) < _ENOUGH * size:
            raise UserError(
                f"the files of source {name} hold {reached / 1e6:,.2f} MB of usable text, {size / 1e6:,.2f} MB are "
                "wanted: lower its text_per_byte in the mix and pin it again, or lower its share"
            )
    return np.array([sizes[name] for name in names], dtype=float)


def read_targets(job: Job, task: int) -> NDArray[np.int32]:
    """What was decided of the documents of a reading task. Raises UserError where it is not what was written."""
    first, last, digest = job.made("decide", 0).counts["places"][task]
    file = job.file("decide", 0, ".bin")
    with open(file, "rb") as opened:
        opened.seek(4 * first)
        found = np.frombuffer(opened.read(4 * (last - first)), dtype=np.int32)
    if _sha256(found) != digest:
        raise UserError(f"{file} was changed after it was written; run the same command again: it is made again")
    return found


def _load(job: Job) -> tuple[Columns, list[int], list[str]]:
    """Columns of all documents, the borders of the reading tasks in them, and the sources' names in their order."""
    made = job.all_made("read")
    names = sorted({name for each in made for name in each.counts["sources"]})
    parts: dict[str, list[Column]] = {name: [] for name in _COLUMNS}
    for task, each in enumerate(made):
        file = job.output("read", task, ".npz")
        numbers = np.array([names.index(name) for name in each.counts["sources"]], dtype=np.uint16)
        for name in _COLUMNS:
            column = read_array(file, name)
            parts[name].append(numbers[column] if name == "source" and len(column) else column)
    borders = [0, *np.cumsum([each.counts["kept"] for each in made]).tolist()]
    return {name: np.concatenate(columns) for name, columns in parts.items()}, borders, names


def _dropped(target: Column, source: Column, names: list[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for number, reason in REASONS.items():
        counts = np.bincount(source[target == number], minlength=len(names))
        for place in np.flatnonzero(counts):
            found.setdefault(names[place], {})[reason] = int(counts[place])
    return found


def _sha256(numbers: Column) -> str:
    return hashlib.sha256(numbers.tobytes()).hexdigest()
