"""Trains the jobs of the study, each in a run folder of its own that goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gap.arms import Job, base_recipe, recipe_of
from benchmarks.gap.evaluation import evaluate
from cognica_poe import pipeline
from cognica_poe.files import read_json, write_bytes

SHARED = ("data", "tokenizer", "rows")


def log(line: str) -> None:
    """A line with the time of day, on stderr."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def shared_folder(work: Path, text: str, seed: int) -> Path:
    """Data, tokenizer and packed rows of a seed, made once."""
    folder = work / "shared" / f"seed-{seed}"
    recipe = base_recipe(text, seed)
    pipeline.prepare(recipe, folder, log, resume=True)
    pipeline.open_rows(folder, recipe, log).batch(0, recipe.training.batch_rows)
    return folder


def run_folder(job: Job, work: Path, text: str) -> Path:
    """The run folder of a job, with links to what its seed shares."""
    run = work / "runs" / job.name
    if not (run / "recipe.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        shared = shared_folder(work, text, job.seed)
        for part in SHARED:
            shutil.copytree(shared / part, run / part, copy_function=os.link)
    return run


def train(job: Job, work: Path, text: str) -> Path:
    """Train and measure a job, as far as it is not done. Returns the file of its result."""
    from cognica_poe.training.compilation import without_compilation
    from cognica_poe.training.trainer import Trainer

    run, recipe = run_folder(job, work, text), recipe_of(job, text)
    result = run / "result.json"
    if result.is_file():
        return result
    pipeline.prepare(recipe, run, log, resume=True)
    started = time.monotonic()

    def progress(step: int, metrics: dict[str, object]) -> None:
        if step % 50 == 0 or step == recipe.training.steps:
            losses = " ".join(f"{loss:.3f}" for loss in metrics["loss_stages"])  # type: ignore[union-attr]
            speed = (step - first) / max(1e-9, time.monotonic() - started)
            left = (recipe.training.steps - step) / max(1e-9, speed) / 60
            log(f"{job.name} step {step}/{recipe.training.steps} losses {losses}, {left:.0f} min left")

    resume = (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir())
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe, log), resume=resume, log=log, progress=progress)
    trainer.start()
    first = trainer.step
    trainer.train()
    with without_compilation():
        write_result(result, evaluate(job, recipe, trainer.model, run, log))
    log(f"{job.name} is done")
    return result


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """A result as JSON with a line per field, though a field may hold a number for each of many documents."""
    fields = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items()]
    write_bytes(file, ("{\n" + ",\n".join(fields) + "\n}\n").encode())


def train_all(jobs: Sequence[Job], work: Path, text: str, results: Path, workers: int) -> None:
    """Every job in a process of one thread and the lowest priority, ``workers`` at a time; results are kept as they
    come, and jobs with a result are left alone."""
    waiting = [job for job in jobs if not (results / f"{job.name}.json").is_file()]
    for seed in sorted({job.seed for job in waiting}):
        shared_folder(work, text, seed)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    log(f"{len(waiting)} of {len(jobs)} jobs to do")
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            running[job] = _start(job, work, text)
        time.sleep(2)
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                if process.returncode:
                    log(f"{job.name} ended with {process.returncode}; see {work / 'logs' / job.name}.txt")
                else:
                    write_result(results / f"{job.name}.json", read_json(work / "runs" / job.name / "result.json"))


def _start(job: Job, work: Path, text: str) -> subprocess.Popen[bytes]:
    (work / "logs").mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "benchmarks.gap", "one", "--work", str(work), "--text", text]
    words += ["--arm", job.arm, "--tokens", str(job.tokens), "--seed", str(job.seed), "--rate", repr(job.rate)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(work / "logs" / f"{job.name}.txt", "ab") as out:
        return subprocess.Popen(words, stderr=out, stdout=out, env=environment, preexec_fn=lambda: os.nice(19))
