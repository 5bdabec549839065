"""Packing ahead of a run as a job: a task for every shard and epoch, finished ones left as they are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cognica_poe.data.engine.job import Job, Made, Outputs, Stage, Values
from cognica_poe.data.manifest import load_manifest
from cognica_poe.data.rows.packing import is_sound, pack
from cognica_poe.data.rows.sequence import RowSettings
from cognica_poe.data.rows.store import PackedRows, are_complete, load_facts
from cognica_poe.data.tokenizer import load_tokenizer


class Pack(Stage):
    """A task per shard and epoch, the shards of the first epoch first. Its rows lie in the folder of rows with a
    sidecar of their own (``data.rows.store``), so the stage has no outputs of its own. Counts the facts."""

    name = "pack"
    endings = ()

    def count(self, job: Job) -> int:
        return int(job.plan["epochs"] * job.plan["shards"])

    def parameters(self, job: Job, number: int) -> Values:
        return {"fingerprint": self._fingerprint(job, number)}

    def is_current(self, job: Job, made: Made) -> bool:
        out, facts = Path(job.plan["out"]), self.facts(job, made.number)
        return facts is not None and are_complete(out, facts) and is_sound(out, facts, lambda line: None)

    def work(self, job: Job, number: int, out: Outputs) -> Values:
        plan, settings = job.plan, RowSettings(**job.plan["settings"])
        epoch, shard = self._place(job, number)
        facts = pack(
            Path(plan["data"]),
            self._tokenizer(job),
            Path(plan["out"]),
            split=settings.split,
            epoch=epoch,
            shard=shard,
            seed=settings.seed,
            row_len=settings.row_len,
            case_aug_prob=settings.case_aug_prob,
            verify=True,
            lasting=True,
        )
        return asdict(facts)

    def facts(self, job: Job, number: int) -> PackedRows | None:
        """Facts of the rows of a task, where they were packed."""
        epoch, shard = self._place(job, number)
        split = job.plan["settings"]["split"]
        return load_facts(Path(job.plan["out"]), split, epoch, shard, self._fingerprint(job, number))

    def _place(self, job: Job, number: int) -> tuple[int, int]:
        """(epoch, shard) of a task."""
        epoch, shard = divmod(number, job.plan["shards"])
        return job.plan["first_epoch"] + epoch, shard

    def _fingerprint(self, job: Job, number: int) -> str:
        settings, manifest = RowSettings(**job.plan["settings"]), load_manifest(Path(job.plan["data"]))
        return settings.fingerprint(manifest, self._tokenizer(job), *self._place(job, number))

    def _tokenizer(self, job: Job) -> Any:
        if not hasattr(self, "_loaded"):
            self._loaded = load_tokenizer(Path(job.plan["tokenizer"]))
        return self._loaded
