"""Interrupted anywhere, by SIGTERM or `kill -9`: the next start finds nothing lost and leaves nothing behind."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cognica_poe import pipeline
from cognica_poe.files import verify_manifest
from cognica_poe.leftovers import PREFIX
from cognica_poe.recipe.stored import save_recipe
from cognica_poe.training.checkpoint import CheckpointFolder
from tests.processes import Command
from tests.runs import small_recipe, write_texts

SLOWEST = 20.0
"""Seconds that a command may take to end after SIGTERM."""


def content(folder, but=()):
    """Every path below ``folder`` with its bytes, or where it points; of what ``but`` names, that it is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = "" if path.name in but else path.read_bytes()
        else:
            found[name] = "folder"
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Texts, a recipe of them, and a run that is released, measured and published."""
    folder = tmp_path_factory.mktemp("start")
    texts = write_texts(folder / "texts")
    recipe = small_recipe(texts, steps=12, checkpoint_every=3, keep_checkpoints=1, compute_dtype="float32")
    recipe = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, log_steps=False))
    save_recipe(recipe, folder / "recipe.json")
    began = time.monotonic()
    assert Command(["run", folder / "recipe.json", "--out", folder / "run"], folder).wait(300) == 0
    (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder


def same_run(folder, reference):
    """Checkpoints to the bit, weights of the releases, and no file more or less. Records hold times, so they differ."""
    timed = ("metrics.jsonl", "events.jsonl", "analysis.json", "index.html", "MANIFEST.sha256", "baseline.json")
    names = [{n for n in content(place, timed) if "/hub/" not in n} for place in (folder, reference)]
    assert names[0] == names[1]
    for part in ("checkpoints", "data", "tokenizer", "rows"):
        assert content(folder / part) == content(reference / part), part
    for weights in reference.glob("release/step-*/model.safetensors"):
        assert (folder / weights.relative_to(reference)).read_bytes() == weights.read_bytes()
    hub = folder / "release" / "hub" / "models--test--small"
    linked = {Path(os.readlink(link)).name for link in hub.glob("snapshots/*/*")}
    assert {blob.name for blob in (hub / "blobs").iterdir()} == linked
    assert {ref.name for ref in (hub / "refs").iterdir()} == {"main", "step-6", "step-12"}
    for snapshot in (hub / "snapshots").iterdir():
        verify_manifest(snapshot)


def same_content(folder, reference):
    assert content(folder) == content(reference)


COMMANDS = {
    "run": (lambda start, out: ["run", start / "recipe.json", "--out", out, "--resume"], same_run),
    "data build": (
        lambda start, out: ["data", "build", start / "texts", "--out", out, "--val-min-bytes", 20_000],
        same_content,
    ),
    "export": (lambda start, out: ["export", start / "run", "--step", 12, "--out", out], same_content),
    "publish": (lambda start, out: ["publish", start / "run", "--to", f"file:{out}"], same_content),
}


class Tally:
    """What became of the interruptions of one command."""

    def __init__(self, name):
        self.name, self.ends, self.slowest = name, {}, 0.0

    def add(self, code, seconds):
        end = {0: "finished before", 143: "SIGTERM", -9: "kill -9"}.get(code, f"exit {code}")
        self.ends[end] = self.ends.get(end, 0) + 1
        if code == 143:
            self.slowest = max(self.slowest, seconds)

    def __str__(self):
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        tried = sum(self.ends.values())
        return f"{self.name:<14} tried {tried}: {ends}; lost 0, left behind 0; slowest end {self.slowest:.1f} s"


def interrupt(command, number, after):
    """Exit code, and the seconds that the end took."""
    while not command.said.is_file():
        time.sleep(0.001)
    time.sleep(after)
    sent = time.monotonic()
    command.signal(number)
    code = command.wait()
    return code, time.monotonic() - sent


def try_command(name, start, tmp_path, each, seed):
    """Interrupt a command ``each`` times by either signal, in the first start of a folder; start it again."""
    words, same = COMMANDS[name]
    rng, tally = random.Random(f"{seed} {name}"), Tally(name)
    if name == "run":
        whole, seconds = start / "run", float((start / "seconds").read_text())
    else:
        whole, began = tmp_path / "whole" / "out", time.monotonic()
        assert Command(words(start, whole), whole.parent).wait(300) == 0
        seconds = time.monotonic() - began
    trial = 0
    while min(tally.ends.get("SIGTERM", 0), tally.ends.get("kill -9", 0)) < each:
        trial += 1
        assert trial <= 6 * each, "the command ends before it is interrupted"
        number = signal.SIGKILL if tally.ends.get("SIGTERM", 0) >= each else signal.SIGTERM
        place = tmp_path / str(trial)
        code, took = interrupt(Command(words(start, place / "out"), place), number, 0.02 + rng.random() * 0.9 * seconds)
        tally.add(code, took)
        assert code in (0, -9 if number == signal.SIGKILL else 143), (code, (place / "said").read_text())
        if code == 143:
            assert took < SLOWEST and (place / "said").read_text().count("cognica-poe: ") == 1
            assert not list(place.rglob(f"{PREFIX}*")), "what can clean up does"
        again = Command(words(start, place / "out"), place)
        assert again.wait(300) == 0, again.lines[-3:]
        same(place / "out", whole)
        assert not list(place.rglob(f"{PREFIX}*")) and not list(place.rglob(".lock"))
        shutil.rmtree(place)
    return tally


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "run"])
def test_a_sample_of_interruptions_loses_nothing(name, start, tmp_path, capsys):
    tally = try_command(name, start, tmp_path, 1, "sample")
    with capsys.disabled():
        print(f"\n{tally}")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_interruptions_lose_nothing(name, start, tmp_path, capsys):
    tally = try_command(name, start, tmp_path, 6, "all")
    with capsys.disabled():
        print(f"\n{tally}")


# ---- two ranks under torchrun -------------------------------------------------------------------------------------

LAUNCHED = """
import os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from cognica_poe.cli.main import main
Path(os.environ["CODES"], "rank-" + os.environ["RANK"]).write_text(str(os.getpid()))
try:
    main()
except SystemExit as end:
    Path(os.environ["CODES"], "code-" + os.environ["RANK"]).write_text(f"{end.code} {time.time()}")
    raise
"""


class Torchrun:
    """``torchrun --nproc-per-node 2 ... train``; each rank leaves its process id and its exit code in ``folder``."""

    def __init__(self, folder, *words):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.folder, script = folder, folder / "launched.py"
        script.write_text(LAUNCHED)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        environment = {**os.environ, "CODES": str(folder), "OMP_NUM_THREADS": "1"}
        with open(folder / "said", "w") as said:
            command = [*launch, *map(str, words)]
            self.process = subprocess.Popen(command, stderr=said, stdout=said, env=environment, start_new_session=True)

    def ranks(self):
        """Process ids of the ranks that got as far as the command."""
        return [int(file.read_text() or 0) for file in self.folder.glob("rank-*")]

    def ends(self):
        """``{rank: (exit code, time)}`` of the ranks that ended by themselves."""
        files = {file.name[-1]: file.read_text().split() for file in self.folder.glob("code-*")}
        return {int(rank): (int(code), float(when)) for rank, (code, when) in files.items()}

    def end(self, timeout=120.0):
        """Exit code of torchrun, and what was said; nobody is left then."""
        self.process.wait(timeout)
        for pid in self.ranks():
            while Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.01)
        return self.process.returncode, (self.folder / "said").read_text()


def last_line(file):
    lines = file.read_text().splitlines() if file.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def wait_for(condition, process, timeout=120.0):
    deadline = time.monotonic() + timeout
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def long_steps(start):
    """A recipe whose step takes minutes: two thousand micro-batches on each of two ranks."""
    recipe = small_recipe(start / "texts", steps=4, batch_rows=4096, micro_rows=1, compute_dtype="float32")
    save_recipe(recipe, start / "long.json")
    return start / "long.json"


def started(run):
    return last_line(run / "events.jsonl").get("event") in ("start", "resume")


def assert_stopped(run, step, ends, sent, said):
    """Both ranks ended in time with 143; the step that was not finished is all that is lost."""
    assert sorted(ends) == [0, 1] and {code for code, _ in ends.values()} == {143}, said[-3000:]
    assert max(when for _, when in ends.values()) - sent < SLOWEST
    assert said.count(f"cognica-poe: stopped at step {step}; resume with --resume") == 1
    assert last_line(run / "events.jsonl")["event"] == "stopped" and not (run / "stop").exists()
    assert CheckpointFolder(run / "checkpoints").steps() == [step] and not list(run.rglob(f"{PREFIX}*"))
    verify_manifest(run / "checkpoints" / f"step-{step}")


@pytest.mark.slow
def test_a_step_of_minutes_under_torchrun_stops_between_micro_batches(long_steps, tmp_path):
    run = tmp_path / "run"
    launched = Torchrun(tmp_path / "codes", "train", long_steps, "--out", run)
    wait_for(lambda: started(run), launched.process)
    time.sleep(2.0)
    sent = time.time()
    launched.process.send_signal(signal.SIGTERM)
    code, said = launched.end()
    assert code == 1
    assert_stopped(run, 0, launched.ends(), sent, said)


SHIMS = {
    "srun": 'exec "$@"',
    "scontrol": 'test "$1" = show && echo localhost; test "$1" = requeue && touch "$CODES/requeued"; true',
    "torchrun": """
        while test "$1" != -m; do shift; done; shift 2
        exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=3 \\
            "$CODES/launched.py" "$@"
    """,
}


@pytest.mark.slow
def test_the_slurm_script_saves_and_goes_back_into_the_queue(long_steps, tmp_path):
    """The script of docs/launch.md, word for word but for recipe and folder, with Slurm's two commands stood in for."""
    text = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
    script = next(block for block in text.split("```") if block.lstrip().startswith("#!/bin/bash")).lstrip()
    assert "--signal=B:TERM@300" in script and "--max-restarts 3" in script
    run, codes = tmp_path / "run", tmp_path / "codes"
    (tmp_path / "bin").mkdir()
    for name, body in {**SHIMS, "job": None}.items():
        changed = script.replace("/shared/runs/3b", str(run))
        changed = changed.replace("train 3b", f"train {long_steps}").replace("--training.micro-rows 8", "")
        (tmp_path / "bin" / name).write_text(changed if body is None else f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    codes.mkdir()
    (codes / "launched.py").write_text(LAUNCHED)
    environment = {**os.environ, "CODES": str(codes), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    for event in ("start", "resume"):  # the second time it is a job that was queued again
        with open(tmp_path / "said", "w") as said:
            job = subprocess.Popen([tmp_path / "bin" / "job"], env=environment, stderr=said, stdout=said)
        wait_for(lambda: started(run), job)
        kinds = [json.loads(line)["event"] for line in (run / "events.jsonl").open()]
        assert kinds[-1] == event or event == "resume"  # of step 0 a run starts again
        time.sleep(1.0)
        sent = time.time()
        job.send_signal(signal.SIGTERM)
        assert job.wait(120) == 0, (tmp_path / "said").read_text()[-3000:]
        ends = {int(f.name[-1]): f.read_text().split() for f in codes.glob("code-*")}
        ends = {rank: (int(code), float(when)) for rank, (code, when) in ends.items()}
        assert_stopped(run, 0, ends, sent, (tmp_path / "said").read_text())
        assert (codes / "requeued").exists()
        (codes / "requeued").unlink()


@pytest.mark.slow
def test_interruptions_of_two_ranks_lose_nothing(start, tmp_path, capsys):
    """One run, six SIGTERM to torchrun and six kills of a rank or of all; then it equals an uninterrupted one."""
    recipe = small_recipe(start / "texts", steps=150, batch_rows=4, micro_rows=1, checkpoint_every=2)
    recipe = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, log_steps=False, every=150))
    one = dataclasses.replace(recipe.training, keep_checkpoints=1, compute_dtype="float32")
    save_recipe(dataclasses.replace(recipe, training=one), start / "two.json")
    words = ["train", start / "two.json", "--resume", "--out"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert Torchrun(tmp_path / "codes", *words, whole).end(300)[0] == 0
    rng, tally, known = random.Random("two ranks"), Tally("train, 2 ranks"), 0
    for trial in range(12):
        launched = Torchrun(tmp_path / "codes", *words, run)
        before = last_line(run / "metrics.jsonl").get("step", 0)
        early = trial in (0, 1)  # while it prepares, or before it trains
        goal = before + rng.randrange(1, 12)
        wait_for(lambda: len(launched.ranks()) == 2, launched.process)  # noqa: B023
        if not early:
            wait_for(lambda: last_line(run / "metrics.jsonl").get("step", 0) >= goal, launched.process)  # noqa: B023
        time.sleep(rng.random() * (2.0 if early else 0.1))
        sent = time.time()
        if trial % 2:
            victims = launched.ranks()[: rng.randrange(1, 3)]
            for pid in [*victims, *([launched.process.pid] if len(victims) == 2 else [])]:
                os.kill(pid, signal.SIGKILL)
            launched.end()
            tally.add(-9, 0.0)
        else:
            launched.process.send_signal(signal.SIGTERM)
            code, said = launched.end()
            ends = launched.ends()
            assert code and sorted(ends) == [0, 1] and {end for end, _ in ends.values()} == {143}, said[-3000:]
            took = max(when for _, when in ends.values()) - sent
            assert took < SLOWEST
            tally.add(143, took)
        steps = CheckpointFolder(run / "checkpoints").steps()
        assert max(steps, default=0) >= known, "a checkpoint was lost"
        known = max(steps, default=0)
        for step in steps:
            verify_manifest(run / "checkpoints" / f"step-{step}")
    assert 0 < known < 150
    assert Torchrun(tmp_path / "codes", *words, run).end(300)[0] == 0
    timed = ("metrics.jsonl", "events.jsonl")
    assert content(run, timed) == content(whole, timed)
    losses = [[json.loads(line)["loss_stages"] for line in (place / timed[0]).open()] for place in (run, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 150
    assert pipeline.read_recipe(run) == pipeline.read_recipe(whole)
    with capsys.disabled():
        print(f"\n{tally}")
