"""Stage ``gather``: the shards of a data folder, each from its slices of every routed file, in hash order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from cognica_poe.data.engine.job import Job, Outputs, Stage, Values
from cognica_poe.data.engine.route import read_slices
from cognica_poe.data.engine.texts import ROW_GROUP, schema


class Gather(Stage):
    """A task per shard. Writes ``.parquet``. Counts ``documents``, ``bytes`` and ``sources``: of each the documents,
    bytes and languages."""

    name = "gather"
    endings = (".parquet",)

    def count(self, job: Job) -> int:
        counts = job.made("decide", 0).counts
        return int(counts["shards"] + counts["val_shards"])

    def needs(self, job: Job, number: int) -> Iterable[tuple[str, int]]:
        return [("slices", 0)]

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        tables = list(read_slices(job, number))
        # in one piece: taking from many pieces puts them together every time
        table = (
            pa.concat_tables(tables).combine_chunks()
            if tables
            else schema().append(pa.field("order", pa.uint64())).empty_table()
        )
        del tables
        order = np.argsort(table.column("order").to_numpy(), kind="stable")
        table = table.drop_columns(["order"])
        with out.write(".parquet") as file, pq.ParquetWriter(file, schema(), compression="zstd") as writer:
            for first in range(0, len(order), ROW_GROUP):
                writer.write_table(table.take(pa.array(order[first : first + ROW_GROUP])), row_group_size=ROW_GROUP)
        sizes = pc.binary_length(table.column("text")).to_numpy()
        held: dict[str, dict[str, Any]] = defaultdict(lambda: {"documents": 0, "bytes": 0, "languages": []})
        keys = table.select(["source", "language"]).group_by(["source", "language"]).aggregate([([], "count_all")])
        for row in keys.to_pylist():
            mine = pc.and_(
                pc.equal(table.column("source"), row["source"]), pc.equal(table.column("language"), row["language"])
            ).to_numpy()
            found = held[row["source"]]
            found["documents"] += row["count_all"]
            found["bytes"] += int(sizes[mine].sum())
            found["languages"] = sorted({*found["languages"], row["language"]})
        return {"documents": len(table), "bytes": int(sizes.sum()), "sources": dict(sorted(held.items()))}
