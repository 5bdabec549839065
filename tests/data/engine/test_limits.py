"""Builds under limits of the system: a full disk, few open files, documents by the hundred thousand, kills."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from cognica_poe.data.build import build, stages_folder
from cognica_poe.data.manifest import load_manifest
from cognica_poe.files import sha256_file
from tests.data.corpora import texts, write_parquet

PROGRAM = """
import sys
from pathlib import Path
from cognica_poe.data import build as building
from cognica_poe.data.engine import plan
from cognica_poe.data.engine.engines import Engine
from cognica_poe.errors import UserError

if __name__ == "__main__":
    source, out, workers, shard_bytes, task_bytes = sys.argv[1:]
    plan._TASK_BYTES = (int(task_bytes), int(task_bytes))
    building.SMALL = 0
    try:
        building.build(
            source, Path(out), val_fraction=0.05, val_min_bytes=100, shard_bytes=int(shard_bytes),
            engine=Engine("local", int(workers)), log=lambda line: print(line, file=sys.stderr),
        )
    except UserError as error:
        sys.exit(f"cognica-poe: {error}")
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) // 1000)
"""


def words(tmp_path, source, out, workers=1, shard_bytes=10**6, task_bytes=4_000_000):
    (tmp_path / "program.py").write_text(PROGRAM)
    return [sys.executable, str(tmp_path / "program.py"), *map(str, (source, out, workers, shard_bytes, task_bytes))]


def call(line, **limits):
    """The line in a process with limits of the system, ``nofile`` and ``fsize``."""

    def set_limits():
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (value, value))

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(line, capture_output=True, text=True, preexec_fn=set_limits, env=environment, check=False)


def shards(folder):
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.suffix == ".parquet"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_what_was_done_is_kept(tmp_path, workers):
    for number in range(2):
        write_parquet(tmp_path / "in" / f"{number}.parquet", [{"text": text} for text in texts(60, 60, seed=number)])
    large = [{"text": text} for text in texts(1500, 60, seed=5)]
    write_parquet(tmp_path / "in" / "z.parquet", large)
    line = words(tmp_path, tmp_path / "in", tmp_path / "data", workers, task_bytes=20_000)
    full = call(line, fsize=60_000)
    said = full.stderr.strip().splitlines()[-1]
    assert full.returncode and said.startswith("cognica-poe: no space left while writing"), full.stderr
    assert not list(tmp_path.rglob(".partial*")) and not (tmp_path / "data").exists()
    again = call(line)
    assert again.returncode == 0 and "were done before" in again.stderr, again.stderr


def short_documents(folder, count):
    folder.mkdir()
    for part in range(4):
        with open(folder / f"part{part}x.jsonl", "w") as out:
            for number in range(part, count, 4):
                out.write(json.dumps({"text": f"document number {number} of a corpus"}) + "\n")
    return folder


@pytest.mark.slow
def test_3000_shards_need_few_open_files(tmp_path):
    source = short_documents(tmp_path / "in", 30_000)
    size = sum(len(f"document number {number} of a corpus") for number in range(30_000))
    done = call(words(tmp_path, source, tmp_path / "data", 2, size // 3_200), nofile=64)
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "data")
    assert len(manifest.shards) > 3_000 and manifest.documents == 30_000


@pytest.mark.slow
def test_documents_cost_keys_and_no_memory(tmp_path):
    peaks = {}
    for count in (50_000, 400_000):
        done = call(words(tmp_path, short_documents(tmp_path / str(count), count), tmp_path / f"data-{count}"))
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout)
    print(peaks)
    assert (peaks[400_000] - peaks[50_000]) * 1e6 / 350_000 < 250  # bytes of memory per document, its text included


@pytest.mark.slow
def test_ten_kills_lose_nothing(tmp_path):
    for number in range(6):
        write_parquet(tmp_path / "in" / f"{number}.parquet", [{"text": text} for text in texts(400, 90, seed=number)])
    line = words(tmp_path, tmp_path / "in", tmp_path / "whole", 2, 200_000, 50_000)
    assert call(line).returncode == 0
    line[3], draw = str(tmp_path / "data"), random.Random(3)
    tasks = sum(stage.tasks for stage in load_manifest(tmp_path / "whole").stages)
    done = lambda: len(list(stages_folder(tmp_path / "data").glob("*/*.json")))  # noqa: E731
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for moment in sorted(draw.sample(range(1, tasks), 10)):
        with subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL, env=environment) as process:
            deadline = time.monotonic() + 120
            while done() < moment and process.poll() is None:
                assert time.monotonic() < deadline
            time.sleep(draw.uniform(0, 0.02))
            os.killpg(process.pid, signal.SIGKILL)
        assert done() >= moment
    last = call(line)
    assert last.returncode == 0, last.stderr
    assert shards(tmp_path / "data") == shards(tmp_path / "whole") and not list(tmp_path.rglob(".partial*"))


def test_what_is_left_of_a_build_is_used_by_the_next_in_another_process(tmp_path):
    write_parquet(tmp_path / "in" / "a.parquet", [{"text": text} for text in texts(60, 60)])
    options = {"val_fraction": 0.05, "val_min_bytes": 100, "shard_bytes": 10**6}
    one = build(tmp_path / "in", tmp_path / "one", **options)
    done = call(words(tmp_path, tmp_path / "in", tmp_path / "two"))
    assert done.returncode == 0 and shards(tmp_path / "two") == shards(tmp_path / "one") and one.documents == 60
