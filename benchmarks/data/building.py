"""Measurements of builds: time and memory, the same bytes by any number of workers and after any number of kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks.data.commands import at_most_files, digests, run, start
from cognica_poe.data.build import begin, stages_folder
from cognica_poe.data.cleaning.rules import Cleaning
from cognica_poe.data.engine.plan import Options, plan_build
from cognica_poe.seals import content_sha256

VOCABULARY = 32_768
ROW_LEN = 2_049
KILLS = 10


def pipeline(text: Path, work: Path) -> dict[str, Any]:
    """Build, tokenizer and pack by 1, 2 and 4 workers."""
    figures: dict[str, Any] = {}
    tokenizer = work / "tokenizer"
    for workers in (1, 2, 4):
        place = work / str(workers)
        shutil.rmtree(place, ignore_errors=True)
        costs = {"build": run(["data", "build", text, "--out", place / "data", "--workers", workers], work)}
        if workers == 1:
            words = ["tokenizer", "train", place / "data", "--out", tokenizer, "--vocab-size", VOCABULARY]
            shutil.rmtree(tokenizer, ignore_errors=True)
            figures["tokenizer"] = run(words, work).as_dict()
        pack = ["data", "pack", place / "data", "--tokenizer", tokenizer, "--out", place / "rows", "--row-len", ROW_LEN]
        costs["pack"] = run([*pack, "--epochs", 1, "--workers", workers], work)
        facts = json.loads((place / "rows" / "rows-train-epoch0-shard0.json").read_text())
        made = {part: content_sha256(digests(place / part)) for part in ("data", "rows")}
        figures[f"{workers} workers"] = {part: cost.as_dict() for part, cost in costs.items()} | {"sha256": made}
        figures["kept_fraction"] = facts["kept_fraction"]
        figures["document_tokens"] = facts["document_tokens"]
    manifest = json.loads((work / "1" / "data" / "manifest.json").read_text())
    figures |= {"bytes": manifest["bytes"], "read": manifest["read"], "dropped": manifest["dropped"]}
    for part in ("build", "pack"):
        figures[f"{part}_mb_per_core_second"] = round(
            manifest["bytes"] / 1e6 / figures["1 workers"][part]["processor_seconds"], 2
        )
    same = len({json.dumps(figures[f"{workers} workers"]["sha256"]) for workers in (1, 2, 4)}) == 1
    return figures | {"same_bytes": same}


def stages(text: Path, work: Path) -> dict[str, Any]:
    """Processor seconds of every stage in one process, near duplicates looked for as well."""
    shutil.rmtree(work / "stages", ignore_errors=True)
    options = Options(cleaning=Cleaning(near_duplicates=True))
    job = begin(work / "stages", plan_build(str(text), work / "data", options, print))
    seconds = {}
    for stage in job.stages:
        began = time.process_time()
        for number in range(job.count(stage)):
            job.run(stage, number)
        seconds[stage] = time.process_time() - began
    size = job.made("decide", 0).counts["bytes"] / 1e6
    rates = {stage: round(size / taken, 1) for stage, taken in seconds.items()}
    hours = {stage: round(280_000 / (rate * 32 * 0.7) / 3_600, 3) for stage, rate in rates.items()}
    return {
        "mb": round(size, 1),
        "seconds": {stage: round(taken, 2) for stage, taken in seconds.items()},
        "mb_per_core_second": rates,
        "hours_of_280_gb_on_32_cores": hours,
        "hours": round(sum(hours.values()), 2),
    }


def kills(text: Path, work: Path) -> dict[str, Any]:
    """A build by two workers, all its processes killed ``KILLS`` times, against one that was not."""
    shutil.rmtree(work, ignore_errors=True)
    whole = run(["data", "build", text, "--out", work / "whole", "--workers", 2], work)
    manifest = json.loads((work / "whole" / "manifest.json").read_text())
    tasks, draw = sum(stage["tasks"] for stage in manifest["stages"]), random.Random(0)
    words: list[object] = ["data", "build", text, "--out", work / "killed", "--workers", 2]
    kept = []
    for moment in sorted(draw.sample(range(1, tasks), KILLS)):
        process = start(words)
        while _finished(work) < moment and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kept.append(_finished(work))
    last = run(words, work)
    return {
        "kills": len(kept),
        "tasks": tasks,
        "finished_after_each": kept,
        "undisturbed": whole.as_dict(),
        "last": last.as_dict(),
        "same_bytes": digests(work / "whole") == digests(work / "killed"),
    }


def _finished(work: Path) -> int:
    return len(list(stages_folder(work / "killed").glob("*/*.json")))


def shards(text: Path, work: Path) -> dict[str, Any]:
    """A build into 3,000 shards with at most 256 open files in each process."""
    shutil.rmtree(work / "shards", ignore_errors=True)
    size = (
        sum(file.stat().st_size for file in _unpacked(text, work).iterdir()) // 3_250
    )  # JSON is a little longer than its text
    words = ["data", "build", work / "unpacked", "--out", work / "shards", "--workers", 2, "--shard-bytes", size]
    cost = run(words, work, at_most_files(256))
    manifest = json.loads((work / "shards" / "manifest.json").read_text())
    return {"shards": len(manifest["shards"]), "open_files": 256, **cost.as_dict()}


def _unpacked(text: Path, work: Path) -> Path:
    """The texts as lines of JSON, without what files' names say of a split."""
    folder = work / "unpacked"
    if not folder.is_dir():
        import pyarrow.parquet as pq

        folder.mkdir(parents=True)
        for file in sorted(text.glob("*.parquet")):
            with open(folder / f"{file.stem.replace('-', '_')}_part.jsonl", "w", encoding="utf-8") as out:
                for value in pq.read_table(file, columns=["text"]).column(0).to_pylist():
                    out.write(json.dumps({"text": value}) + "\n")
    return folder


def keys(text: Path, work: Path) -> dict[str, Any]:
    """A build of two million documents of a few words: what documents cost beside their text."""
    folder, documents = work / "short", 2_000_000
    if not folder.is_dir():
        folder.mkdir(parents=True)
        for part in range(8):
            with open(folder / f"part{part}x.jsonl", "w", encoding="utf-8") as out:
                for number in range(part, documents, 8):
                    out.write(json.dumps({"text": f"document number {number} of a corpus"}) + "\n")
    shutil.rmtree(work / "many", ignore_errors=True)
    began = time.perf_counter()
    cost = run(["data", "build", folder, "--out", work / "many", "--workers", 2], work)
    manifest = json.loads((work / "many" / "manifest.json").read_text())
    return {
        "documents": manifest["documents"],
        "seconds_in_all": round(time.perf_counter() - began, 1),
        **cost.as_dict(),
    }
