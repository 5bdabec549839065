"""Build a data folder: parquet shards of training and validation documents, and a manifest that accounts for them.

A mix is ``python-docs`` (embedded), ``frontier_v1`` or a mix file (Hub datasets), or a path of local files. The work is
done in stages (``data.engine``) beside the folder to be made, so that a build that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cognica_poe.data.cleaning.rules import Cleaning
from cognica_poe.data.engine.engines import HERE, Engine
from cognica_poe.data.engine.job import PLAN, Job, Values, write_plan
from cognica_poe.data.engine.local import SMALL
from cognica_poe.data.engine.plan import SHARD_BYTES, Options, plan_build
from cognica_poe.data.engine.stages import open_job
from cognica_poe.data.manifest import SPLITS, DataManifest, ShardRecord, SourceRecord, StageRecord, Totals
from cognica_poe.data.mixes import PYTHON_DOCS
from cognica_poe.data.sources import python_docs
from cognica_poe.errors import UserError
from cognica_poe.files import atomic_folder, require_replaceable, require_space, write_json
from cognica_poe.locks import hold
from cognica_poe.seals import content_sha256

Log = Callable[[str], None]


def build(
    mix_or_path: str | Path,
    out: Path,
    *,
    val_fraction: float = 0.02,
    val_min_bytes: int = 200_000,
    seed: int = 0,
    max_bytes: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    cleaning: Cleaning = Cleaning(),  # noqa: B008
    engine: Engine = HERE,
    log: Log = lambda line: None,
) -> DataManifest:
    """Build ``out`` from a mix name, a mix file (.json) or local files, and return its manifest.

    Whole documents (groups) are held out by a hash of (seed, group), the same part of every source. Files whose names
    say so keep their split (``explicit_split`` of ``data.sources.local``); test splits are left out. ``max_bytes``
    takes a sample of each source by hash; it is the size to read for Hub mixes and bounds the training part where file
    names split; a text that would go beyond by more than a tenth is left out. ``cleaning`` says which documents are
    dropped; all are counted. ``engine`` says who does the work; the bytes are the same from any.
    Raises UserError for unusable input (see ``data.sources``), too little text, or an ``out`` that holds anything but
    data of ours, or lies in what is read. What was done by then is kept beside ``out`` for the next call.
    """
    out = Path(out)
    require_replaceable(out, "data")
    options = Options(val_fraction, val_min_bytes, seed, max_bytes, shard_bytes, cleaning)
    plan = plan_build(str(mix_or_path), out, options, log)
    folder = stages_folder(out)
    with hold(folder):
        job = begin(folder, plan)
        size = sum(part.get("size", 0) for parts in plan["parts"] for part in parts)
        require_space(out, size - sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
        try:
            engine.run(job, log, small=size < SMALL)
            manifest = finish(job, out)
        except BaseException as error:
            refused = isinstance(error, UserError) and size < SMALL and job.file("duplicates", 0, ".json").is_file()
            if refused or not any(job.folder.glob("*/*.json")):
                shutil.rmtree(folder, ignore_errors=True)  # nothing is done that would be worth keeping
            raise
    for split in SPLITS:
        total = manifest.splits[split]
        log(f"data: {split}: {total.documents:,} documents, {total.bytes / 1e6:.2f} MB")
    return manifest


def plan_only(mix_or_path: str | Path, out: Path, *, log: Log = lambda line: None, **options: Any) -> Job:
    """Plan what ``build`` would do with the same ``options``, for tasks that something else starts.

    Raises UserError as ``build`` does before it reads anything.
    """
    require_replaceable(Path(out), "data")
    plan = plan_build(str(mix_or_path), Path(out), Options(**options), log)
    with hold(stages_folder(out)):
        return begin(stages_folder(out), plan)


def stages_folder(out: Path) -> Path:
    """Where the stages of a build of ``out`` stand until it is done."""
    return Path(out).absolute().parent / f".{Path(out).absolute().name}-stages"


def begin(folder: Path, plan: Values) -> Job:
    """The job of a plan in its folder. Raises UserError for a folder that holds something else."""
    strange = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if strange and not (folder / PLAN).is_file():
        raise UserError(f"{folder} is where the stages of a build go, and holds {strange[0]}: move that elsewhere")
    write_plan(folder, plan)
    return open_job(folder)


def link_or_copy(file: Path, other: Path) -> None:
    """Give a finished file a second name, or a second self where the file system knows no links."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def finish(job: Job, out: Path) -> DataManifest:
    """Make ``out`` of the shards of a job that is done, and remove the job."""
    gathered = job.all_made("gather")
    training = job.made("decide", 0).counts["shards"]
    shards = []
    with atomic_folder(out, "data") as folder:
        for made in gathered:
            split = "train" if made.number < training else "val"
            name = f"{split}-{made.number - (0 if split == 'train' else training):05d}.parquet"
            if not made.counts["documents"] and (split, made.number) not in (("train", 0), ("val", training)):
                continue
            link_or_copy(job.output("gather", made.number, ".parquet"), folder / name)
            totals = {key: made.counts[key] for key in ("documents", "bytes")}
            shards.append(ShardRecord(file=name, split=split, sha256=made.outputs[".parquet"], **totals))
        if not any(shard.bytes for shard in shards if shard.split == "train"):
            raise UserError("no training text is left beside the validation split; add text")
        manifest = _manifest(job, shards)
        write_json(folder / "manifest.json", manifest.model_dump())
    shutil.rmtree(job.folder)
    return manifest


def _manifest(job: Job, shards: list[ShardRecord]) -> DataManifest:
    """What the folder of ``shards`` says of itself."""
    plan, options = job.plan, job.plan["options"]
    dropped = _dropped(job)
    by_reason: Counter[str] = Counter()
    for reasons in dropped.values():
        by_reason.update(reasons)
    documents = sum(shard.documents for shard in shards)
    return DataManifest(
        mix=plan["name"],
        **{name: options[name] for name in ("seed", "val_fraction", "val_min_bytes", "max_bytes", "shard_bytes")},
        cleaning=options["cleaning"],
        documents=documents,
        bytes=sum(shard.bytes for shard in shards),
        read=documents + by_reason.total(),
        splits={split: _total(shards, split) for split in SPLITS},
        shards=shards,
        sources=_source_records(job),
        dropped=dict(sorted(by_reason.items())),
        dropped_by_source=dropped,
        stages=[_stage_record(job, stage) for stage in job.stages],
        versions={"python": platform.python_version()},
    )


def _dropped(job: Job) -> dict[str, dict[str, int]]:
    """Documents left out by every stage, by source and reason."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for stage in job.stages:
        for made in job.all_made(stage):
            for source, reasons in made.counts.get("dropped", {}).items():
                found[source].update(reasons)
    return {source: dict(sorted(reasons.items())) for source, reasons in sorted(found.items())}


def _stage_record(job: Job, stage: str) -> StageRecord:
    """A stage by the digest of all its sidecars, without what only tells of the machine that it ran on."""
    said = [[made.number, made.version, dict(made.inputs), dict(made.outputs)] for made in job.all_made(stage)]
    return StageRecord(name=stage, version=job.stages[stage].version, tasks=len(said), sha256=content_sha256(said))


def _source_records(job: Job) -> list[SourceRecord]:
    """What was asked for and what was reached, in the order of the mix."""
    plan = job.plan
    training = job.made("decide", 0).counts["shards"]
    held: dict[str, dict[str, Any]] = {}
    for made in job.all_made("gather"):
        for name, found in made.counts["sources"].items():
            sums = held.setdefault(name, {"documents": Counter(), "bytes": Counter(), "languages": set()})
            for key in ("documents", "bytes"):
                sums[key]["train" if made.number < training else "val"] += found[key]
            sums["languages"].update(found["languages"])
    total = sum(found["bytes"].total() for found in held.values())
    described: Mapping[str, Any] = {source["name"]: source for source in plan["mix"]["sources"]} if plan["mix"] else {}
    records = []
    for name in sorted(held, key=lambda name: (list(described).index(name) if name in described else -1, name)):
        found, wish = held[name], described.get(name, {})
        embedded = python_docs.LICENCES.get(name) if plan["given"] == PYTHON_DOCS else None
        records.append(
            SourceRecord(
                name=name,
                dataset=wish.get("dataset"),
                revision=wish.get("revision"),
                licence=wish.get("licence") or embedded or "not stated (local files)",
                languages=sorted(found["languages"]),
                share_wanted=round(plan["sizes"][name] / sum(plan["sizes"].values()), 6) if plan["sizes"] else None,
                share_reached=round(found["bytes"].total() / total, 6),
                documents=found["documents"].total(),
                bytes=found["bytes"].total(),
                val_documents=found["documents"]["val"],
                val_bytes=found["bytes"]["val"],
            )
        )
    return records


def _total(shards: list[ShardRecord], split: str) -> Totals:
    return Totals(
        documents=sum(shard.documents for shard in shards if shard.split == split),
        bytes=sum(shard.bytes for shard in shards if shard.split == split),
    )
