"""Stages ``held``, ``route`` and ``slices``: the documents of a task in the order of their shards, where they stand.

A routed file is slices one behind the other, each the documents of one shard as a compressed Arrow stream. So a shard
is gathered by reading its slice of every file, and no task has more than one file open for writing.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from cognica_poe.data.cleaning.leaks import ValidationIndex
from cognica_poe.data.cleaning.rules import VALIDATION_TEXT
from cognica_poe.data.documents import Document
from cognica_poe.data.engine.decide import read_targets
from cognica_poe.data.engine.groups import Column
from cognica_poe.data.engine.job import Job, Outputs, Stage, Values
from cognica_poe.data.engine.keys import read_array, write_arrays
from cognica_poe.data.engine.texts import COLUMNS, DocumentWriter, read_batches
from cognica_poe.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_SLAB_BYTES = 128_000_000  # of text that a task holds at once
_INDEX = {"target": np.int32, "offset": np.int64, "length": np.int64, "sum": np.uint64}


class Held(Stage):
    """A task per reading task. Writes ``.parquet``: its documents of the validation split."""

    name = "held"
    endings = (".parquet",)

    def count(self, job: Job) -> int:
        return job.count("read")

    def needs(self, job: Job, number: int) -> Iterable[tuple[str, int]]:
        return [("read", number), ("decide", 0)]

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        targets, first = read_targets(job, number), job.made("decide", 0).counts["shards"]
        at = 0
        with out.write(".parquet") as file, DocumentWriter(file) as writer:
            if (targets >= first).any():
                for batch in read_batches(job.output("read", number, ".parquet")):
                    for place in np.flatnonzero(targets[at : at + len(batch)] >= first).tolist():
                        document = Document(*(column[place].as_py() for column in batch.columns))
                        writer.add(document, len(document.text.encode()))
                    at += len(batch)
        return {"documents": int((targets >= first).sum())}


class Route(Stage):
    """A task per reading task. Writes ``.bin``, slices, and ``.npz``, the shard, place and digest of each.

    Training texts that hold validation text are left out. Counts ``dropped`` (by source and reason).
    """

    name = "route"
    endings = (".bin", ".npz")

    def count(self, job: Job) -> int:
        return job.count("read")

    def parameters(self, job: Job, number: int) -> Values:
        return {"validation_leaks": job.plan["options"]["cleaning"]["validation_leaks"]}

    def needs(self, job: Job, number: int) -> Iterable[tuple[str, int]]:
        return [("read", number), ("decide", 0), *(("held", i) for i in range(job.count("held")))]

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        targets, first = read_targets(job, number).copy(), job.made("decide", 0).counts["shards"]
        held_out, dropped = _validation(job), defaultdict[str, Counter[str]](Counter)
        order = read_array(job.output("read", number, ".npz"), "order")
        index: dict[str, list[int]] = {name: [] for name in _INDEX}
        with out.write(".bin") as file:
            for at, table in _slabs(job, number):
                target = targets[at : at + len(table)]
                sources = table.column("source")
                for place in np.flatnonzero((target >= 0) & (target < first)).tolist():
                    if table.column("text")[place].as_py() in held_out:
                        target[place] = -1
                        dropped[sources[place].as_py()][VALIDATION_TEXT] += 1
                for shard, data in _slices(table, order[at : at + len(table)], target):
                    where = (shard, file.tell(), len(data), _sum(data))
                    for name, value in zip(_INDEX, where, strict=True):
                        index[name].append(value)
                    file.write(data)
        with out.write(".npz") as file:
            write_arrays(file, {name: np.array(index[name], dtype=kind) for name, kind in _INDEX.items()})
        return {"dropped": {source: dict(reasons) for source, reasons in sorted(dropped.items())}}


class Slices(Stage):
    """One task. Writes ``.npz``: the slices of all routed files in the order of their shards, with ``task``."""

    name = "slices"
    endings = (".npz",)

    def count(self, job: Job) -> int:
        return 1

    def needs(self, job: Job, number: int) -> Iterable[tuple[str, int]]:
        return (("route", i) for i in range(job.count("route")))

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        columns: dict[str, list[Column]] = {name: [] for name in (*_INDEX, "task")}
        for task in range(job.count("route")):
            file = job.output("route", task, ".npz")
            for name in _INDEX:
                columns[name].append(read_array(file, name))
            columns["task"].append(np.full(len(columns["target"][-1]), task, dtype=np.int32))
        merged = {name: np.concatenate(parts) for name, parts in columns.items()}
        order = np.argsort(merged["target"], kind="stable")
        with out.write(".npz") as opened:
            write_arrays(opened, {name: column[order] for name, column in merged.items()})
        return {"slices": len(order)}


def read_slices(job: Job, shard: int) -> Iterator[pa.Table]:
    """The documents of a shard with their ``order``, one table per slice, in the order of the plan.

    Raises UserError for a slice that is not what was written.
    """
    import pyarrow as pa

    file = job.output("slices", 0, ".npz")
    target = read_array(file, "target")
    mine = slice(*np.searchsorted(target, [shard, shard + 1]).tolist())
    columns = [read_array(file, name)[mine].tolist() for name in ("task", "offset", "length", "sum")]
    for task, offset, length, digest in zip(*columns, strict=True):
        routed = job.file("route", task, ".bin")
        with open(routed, "rb") as opened:
            opened.seek(offset)
            data = opened.read(length)
        if _sum(data) != digest:
            raise UserError(f"{routed} was changed after it was written; run the same command again: it is made again")
        yield pa.ipc.open_stream(data).read_all()


def _validation(job: Job) -> ValidationIndex:
    """What training texts may not hold; nothing where that is not looked for."""
    if not job.plan["options"]["cleaning"]["validation_leaks"]:
        return ValidationIndex([])
    files = (job.output("held", i, ".parquet") for i in range(job.count("held")))
    return ValidationIndex(
        text for file in files for batch in read_batches(file) for text in batch.column(0).to_pylist()
    )


def _slabs(job: Job, task: int) -> Iterator[tuple[int, pa.Table]]:
    """The documents of a reading task, as many at a time as fit, each time with the place of the first."""
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    at = size = 0
    for batch in read_batches(job.output("read", task, ".parquet")):
        waiting.append(batch)
        size += batch.nbytes
        if size >= _SLAB_BYTES:
            table = pa.Table.from_batches(waiting)
            yield at, table
            at, size, waiting = at + len(table), 0, []
    if waiting:
        yield at, pa.Table.from_batches(waiting)


def _slices(table: pa.Table, order: Column, target: Column) -> Iterator[tuple[int, bytes]]:
    """(shard, stream) for every shard that some of the documents go to, ascending."""
    import pyarrow as pa

    table = table.select(list(COLUMNS)).append_column("order", pa.array(order))
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    places = np.argsort(target, kind="stable")
    shards, starts = np.unique(target[places], return_index=True)
    for shard, first, last in zip(shards.tolist(), starts, [*starts[1:], len(places)], strict=True):
        if shard < 0:
            continue
        sink = pa.BufferOutputStream()
        part = table.take(pa.array(places[first:last])).combine_chunks()
        with pa.ipc.new_stream(sink, part.schema, options=options) as stream:
            stream.write_table(part)
        yield shard, sink.getvalue().to_pybytes()


def _sum(data: bytes) -> int:
    """First 8 bytes of the sha256 of a slice, as a number."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
