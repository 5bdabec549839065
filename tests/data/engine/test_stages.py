"""A build in stages: the same bytes from any number of workers, kept where it stopped, refused where a byte changed."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from cognica_poe.data import build as building
from cognica_poe.data.build import build, stages_folder
from cognica_poe.data.engine import local, plan
from cognica_poe.data.engine.engines import Engine
from cognica_poe.data.engine.job import Job
from cognica_poe.data.engine.read import Read
from cognica_poe.data.engine.stages import open_job, run_task
from cognica_poe.errors import UserError
from cognica_poe.files import sha256_file
from tests.data.corpora import texts, write_parquet

OPTIONS = {"val_fraction": 0.1, "val_min_bytes": 100, "shard_bytes": 60_000}


def content(folder):
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six files of 60 documents, a tenth of them copies of others."""
    folder = tmp_path_factory.mktemp("source")
    wanted = texts(324, 60)
    rows = [wanted[i % len(wanted)] for i in range(360)]
    for number in range(6):
        part = rows[number::6]
        write_parquet(
            folder / f"{number}.parquet", [{"text": t, "origin": f"{number}/{i}"} for i, t in enumerate(part)]
        )
    return folder


@pytest.fixture(scope="module", autouse=True)
def several_tasks():
    """As many tasks for a little text as there are for much, and processes for it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan, "_TASK_BYTES", (20_000, 20_000))
        patched.setattr(building, "SMALL", 0)
        yield


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "data"
    build(source, out, **OPTIONS)
    return content(out)


def stopped(source, out, monkeypatch, stage, number):
    """A build that ends at a task as if killed there; returns the folder of its stages."""
    run = Job.run

    def until(self, name, at, log=lambda line: None):
        if (name, at) == (stage, number):
            raise KeyboardInterrupt
        return run(self, name, at, log)

    with monkeypatch.context() as patched:
        patched.setattr(Job, "run", until)
        with pytest.raises(KeyboardInterrupt):
            build(source, out, **OPTIONS)
    return stages_folder(out)


def test_the_division_into_tasks_does_not_matter(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_TASK_BYTES", (10**9, 10**9))
    manifest = build(source, tmp_path / "one", **OPTIONS)
    shards = {shard.file: shard.sha256 for shard in manifest.shards}
    assert manifest.stages[0].tasks == 1 and shards.items() <= whole.items()
    assert len([name for name in shards if name.startswith("train")]) > 1


def test_parts_of_a_file_are_the_whole(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    table = pa.table({"text": texts(200, 60)})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=20)
    parted = build(tmp_path / "in", tmp_path / "parted", **OPTIONS)
    monkeypatch.setattr(plan, "_TASK_BYTES", (10**9, 10**9))
    one = build(tmp_path / "in", tmp_path / "one", **OPTIONS)
    assert parted.stages[0].tasks > 2 and one.stages[0].tasks == 1 and parted.sha256 == one.sha256


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(source, whole, tmp_path, workers):
    build(source, tmp_path / "data", engine=Engine("local", workers), **OPTIONS)
    assert content(tmp_path / "data") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("stage, number", [("read", 3), ("decide", 0), ("route", 1), ("gather", 1)])
def test_a_build_goes_on_where_it_stopped(source, whole, tmp_path, monkeypatch, stage, number):
    folder = stopped(source, tmp_path / "data", monkeypatch, stage, number)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.json")}
    assert before
    lines, worked = [], watch(monkeypatch)
    build(source, tmp_path / "data", log=lines.append, **OPTIONS)
    assert content(tmp_path / "data") == whole and not folder.exists()
    assert len(worked) == open_reads(before) and any("were done before" in line for line in lines)


def watch(monkeypatch):
    """The numbers of the reading tasks that are done from now on."""
    worked, work = [], Read.work
    monkeypatch.setattr(Read, "work", lambda self, job, at, out: worked.append(at) or work(self, job, at, out))
    return worked


def open_reads(before):
    """Reading tasks that were left to do: of six files of one task each."""
    return 6 - len([path for path in before if path.parent.name == "read"])


def test_other_options_read_nothing_again(source, tmp_path, monkeypatch):
    stopped(source, tmp_path / "data", monkeypatch, "route", 0)
    worked = watch(monkeypatch)
    again = build(source, tmp_path / "data", **{**OPTIONS, "val_fraction": 0.2})
    assert not worked and again.sha256 == build(source, tmp_path / "fresh", **{**OPTIONS, "val_fraction": 0.2}).sha256


@pytest.mark.parametrize("name", ["read/00002.parquet", "read/00001.npz", "read/00000.json", "route/00003.bin"])
def test_a_changed_byte_is_named_and_made_again(source, whole, tmp_path, monkeypatch, name):
    folder = stopped(source, tmp_path / "data", monkeypatch, "gather", 0)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)
    lines = []
    build(source, tmp_path / "data", log=lines.append, **OPTIONS)
    assert any(str(folder / name) in line for line in lines), lines
    assert content(tmp_path / "data") == whole


def test_a_byte_changed_while_the_build_runs_is_refused_by_name(source, tmp_path, monkeypatch):
    folder = stopped(source, tmp_path / "data", monkeypatch, "gather", 0)
    for name, stage in (("route/00000.bin", "gather"), ("decide/00000.bin", "route"), ("read/00000.parquet", "route")):
        file = folder / name
        sound = file.read_bytes()
        file.write_bytes(sound[:40] + bytes([sound[40] ^ 1]) + sound[41:])
        if stage == "route":
            (folder / "route" / "00000.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=str(file)):
            for number in range(3):
                run_task(folder, stage, number)
        file.write_bytes(sound)


def test_a_source_that_changes_is_read_again(source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "in")
    folder = stopped(tmp_path / "in", tmp_path / "data", monkeypatch, "route", 0)
    os.utime(tmp_path / "in" / "0.parquet")  # another time, the same bytes
    write_parquet(tmp_path / "in" / "3.parquet", [{"text": text} for text in texts(60, 60, seed=9)])
    worked = watch(monkeypatch)
    build(tmp_path / "in", tmp_path / "data", **OPTIONS)
    assert worked == [3] and not folder.exists()


def test_a_source_that_fails_keeps_what_was_read_before(source, tmp_path):
    shutil.copytree(source, tmp_path / "in")
    sound = (tmp_path / "in" / "4.parquet").read_bytes()
    (tmp_path / "in" / "4.parquet").write_bytes(sound[: len(sound) // 2])
    with pytest.raises(UserError, match=r"4\.parquet is not a readable parquet file") as error:
        build(tmp_path / "in", tmp_path / "data", **OPTIONS)
    assert "\n" not in str(error.value)
    assert len(list((stages_folder(tmp_path / "data") / "read").glob("*.json"))) == 4
    (tmp_path / "in" / "4.parquet").write_bytes(sound)
    lines = []
    build(tmp_path / "in", tmp_path / "data", log=lines.append, **OPTIONS)
    assert "data: read: 4 of 6 tasks were done before" in lines


def test_a_killed_worker_is_one_line_and_no_hang(source, whole, tmp_path, monkeypatch):
    began = time.monotonic()
    job = planned(source, tmp_path)
    with local.started(job.folder, 2) as pool:
        pool.run("read", 2, print)
        pool._workers[0].process.kill()
        said = r"worker process at task . of stage read was killed by SIGKILL.*run the same"
        with pytest.raises(UserError, match=said):
            pool.run("read", 6, print)
    assert time.monotonic() - began < 30
    assert not list(tmp_path.rglob(".partial*"))


def test_workers_end_with_the_process_that_started_them(source, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from cognica_poe.data.engine import local\n"
        "if __name__ == '__main__':\n"
        "    with local.started(sys.argv[1], 2) as pool:\n"
        "        print(*(worker.process.pid for worker in pool._workers), flush=True)\n"
        "        time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        workers = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.05)
    assert len(workers) == 2


def planned(source, folder):
    made = plan.plan_build(str(source), folder / "data", plan.Options(**OPTIONS), print)
    return building.begin(folder / "stages", made)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_mistakes(source, tmp_path):
    job = planned(source, tmp_path)
    for stage, number, said in (
        ("reed", 0, "there is no stage 'reed'"),
        ("read", 6, "tasks 0 to 5, there is no task 6"),
        ("decide", 0, "task 0 of stage read is not done"),
    ):
        with pytest.raises(UserError, match=said):
            run_task(job.folder, stage, number)
    with pytest.raises(UserError, match=r"holds no plan\.json"):
        run_task(tmp_path, "read", 0)
    (tmp_path / "stages" / "plan.json").write_text(json.dumps({"kind": "build"}))
    with pytest.raises(UserError, match=r"plan\.json carries no sha256"):
        open_job(tmp_path / "stages")
    stages_folder(tmp_path / "data").mkdir()
    (stages_folder(tmp_path / "data") / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.txt: move that elsewhere"):
        build(source, tmp_path / "data", **OPTIONS)


def test_the_manifest_accounts_for_every_document_read(source, tmp_path):
    manifest = build(source, tmp_path / "data", **OPTIONS, max_bytes=60_000)
    assert manifest.read == 360 == manifest.documents + sum(manifest.dropped.values())
    assert {source: sum(reasons.values()) for source, reasons in manifest.dropped_by_source.items()}
    by_reason = {}
    for reasons in manifest.dropped_by_source.values():
        for reason, count in reasons.items():
            by_reason[reason] = by_reason.get(reason, 0) + count
    assert by_reason == manifest.dropped and manifest.dropped["duplicate"] == 36
