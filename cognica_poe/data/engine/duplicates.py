"""Stage ``duplicates``: texts that came before, found on their digests, a range of the digests at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from cognica_poe.data.engine.job import Job, Outputs, Stage, Values
from cognica_poe.data.engine.keys import read_array, write_arrays

_RANGE = 8_000_000  # documents whose digests are sorted at once, 24 bytes each


class Duplicates(Stage):
    """A task per range of digests. Writes ``.npz`` with ``later``: int64, places in the plan of all but the first of
    equal texts, sorted."""

    name = "duplicates"
    endings = (".npz",)

    def count(self, job: Job) -> int:
        documents: int = sum(made.counts["kept"] for made in job.all_made("read"))
        return max(1, math.ceil(documents / _RANGE))

    def parameters(self, job: Job, number: int) -> Values:
        return {"ranges": self.count(job), "exact_duplicates": job.plan["options"]["cleaning"]["exact_duplicates"]}

    def needs(self, job: Job, number: int) -> Iterable[tuple[str, int]]:
        return (("read", i) for i in range(job.count("read")))

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        ranges, first = self.count(job), 0
        digests, places = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)]
        for task in range(job.count("read")):
            digest = read_array(job.output("read", task, ".npz"), "digest")
            mine = np.flatnonzero(digest[:, 1] % np.uint64(ranges) == number)
            digests.append(digest[mine])
            places.append(first + mine)
            first += len(digest)
        all_digests, all_places = np.concatenate(digests), np.concatenate(places)
        order = np.lexsort((all_places, all_digests[:, 1], all_digests[:, 0]))
        ordered = all_digests[order]
        same = (ordered[1:] == ordered[:-1]).all(axis=1)
        later = np.sort(all_places[order[1:][same]])
        if not job.plan["options"]["cleaning"]["exact_duplicates"]:
            later = later[:0]
        with out.write(".npz") as file:
            write_arrays(file, {"later": later})
        return {"documents": len(all_places), "later": len(later)}
