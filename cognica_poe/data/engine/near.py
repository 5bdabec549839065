"""Stage ``near``: texts that share most of their words with one that came before, by the bands of their signatures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from cognica_poe.data.cleaning.duplicates import clusters, equal_pairs
from cognica_poe.data.cleaning.minhash import BANDS
from cognica_poe.data.engine.groups import Column
from cognica_poe.data.engine.job import Job, Outputs, Stage, Values
from cognica_poe.data.engine.keys import band_name, read_array, write_arrays


class Near(Stage):
    """One task, one band at a time. Writes ``.npz`` with ``later``: int64, places in the plan of all but the first of
    nearly equal texts, without those that ``duplicates`` names. Empty where near duplicates stay."""

    name = "near"
    endings = (".npz",)

    def count(self, job: Job) -> int:
        return 1

    def parameters(self, job: Job, number: int) -> Values:
        return {"near_duplicates": job.plan["options"]["cleaning"]["near_duplicates"]}

    def needs(self, job: Job, number: int) -> Iterable[tuple[str, int]]:
        return [(stage, i) for stage in ("read", "duplicates") for i in range(job.count(stage))]

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        later = np.zeros(0, np.int64)
        if self.parameters(job, number)["near_duplicates"]:
            gone = [read_array(job.output("duplicates", i, ".npz"), "later") for i in range(job.count("duplicates"))]
            kept = np.ones(sum(made.counts["kept"] for made in job.all_made("read")), dtype=bool)
            kept[np.concatenate(gone)] = False
            places = np.flatnonzero(kept)
            label = clusters(len(places), (equal_pairs(keys[kept]) for keys in _bands(job)))
            later = places[label != np.arange(len(places))]
        with out.write(".npz") as file:
            write_arrays(file, {"later": later})
        return {"later": len(later)}


def _bands(job: Job) -> Iterator[Column]:
    """The keys of all documents in every band, uint64 [documents]."""
    files = [job.output("read", task, ".npz") for task in range(job.count("read"))]
    for band in range(BANDS):
        yield np.concatenate([np.zeros(0, np.uint64), *(read_array(file, band_name(band)) for file in files)])
