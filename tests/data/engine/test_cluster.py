"""Slurm, by commands that stand in for it, and Ray on one machine: the bytes of the local engine, failures in one line.

Needs datatrove (``cognica-poe[cluster]``) and Ray, each test what it names.
"""

import importlib.util
import os
import sys

import pytest

from cognica_poe.data import build as building
from cognica_poe.data.build import build
from cognica_poe.data.engine import cluster, plan
from cognica_poe.data.engine.engines import Engine
from cognica_poe.errors import UserError
from cognica_poe.files import sha256_file
from tests.data.corpora import texts, write_parquet

needs_datatrove = pytest.mark.skipif(not importlib.util.find_spec("datatrove"), reason="needs datatrove")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray")
OPTIONS = {"val_fraction": 0.1, "val_min_bytes": 100, "shard_bytes": 40_000}
SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
found = re.search(r"#SBATCH --array=0-(\\d+)", script)
offset = re.search(r"RUN_OFFSET=(\\d+)", " ".join(sys.argv))
name = "launch_pickled_pipeline"  # the other job adds up statistics
command = script[script.index(name) :].split() if name in script else []
for task in range(int(found[1]) + 1 if command else 0):
    environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_NODELIST="here", SLURM_JOB_ID="7")
    environment["RUN_OFFSET"] = offset[1] if offset else "0"
    words = [sys.executable, "-m", "datatrove.tools.launch_pickled_pipeline", command[1]]
    subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SCONTROL = "#!/bin/sh\necho here\n"


@pytest.fixture(scope="module", autouse=True)
def several_tasks():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan, "_TASK_BYTES", (20_000, 20_000))
        patched.setattr(building, "SMALL", 0)
        patched.setattr(cluster, "_PATIENCE", 0.0)
        patched.setattr(cluster, "_POLL", 0.05)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(3):
        write_parquet(folder / f"{number}.parquet", [{"text": text} for text in texts(40, 60, seed=number)])
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "data"
    build(source, out, **OPTIONS)
    return content(out)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """An engine whose jobs run at once, one after the other."""
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH.replace("{python}", sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return Engine("slurm", None, {"partition": "any", "time": "01:00:00"})


def content(folder):
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


@needs_datatrove
def test_slurm_gives_the_same_bytes(source, whole, slurm, tmp_path):
    build(source, tmp_path / "data", engine=slurm, **OPTIONS)
    assert content(tmp_path / "data") == whole


@needs_datatrove
def test_a_task_that_fails_on_slurm_is_one_line_and_the_others_are_kept(source, whole, slurm, tmp_path):
    (tmp_path / "in").mkdir()
    for file in source.iterdir():
        (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "in" / "1.parquet").write_bytes(b"PAR1 no more" * 900)
    with pytest.raises(UserError, match=r"1 of 3 tasks of stage read .*1\.parquet is not a readable") as error:
        build(tmp_path / "in", tmp_path / "data", engine=slurm, **OPTIONS)
    assert "\n" not in str(error.value)
    (tmp_path / "in" / "1.parquet").write_bytes((source / "1.parquet").read_bytes())
    lines = []
    build(tmp_path / "in", tmp_path / "data", log=lines.append, **OPTIONS)  # by another engine
    assert "data: read: 2 of 3 tasks were done before" in lines
    assert {name: whole[name] for name in whole if name.endswith(".parquet")}.items() <= content(
        tmp_path / "data"
    ).items()


@needs_datatrove
@needs_ray
@pytest.mark.slow
def test_ray_on_one_machine_gives_the_same_bytes(source, whole, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    engine = Engine("ray", 2, {"mem_per_cpu_gb": "0.5"})
    try:
        build(source, tmp_path / "data", engine=engine, **OPTIONS)
    finally:
        ray.shutdown()
    assert content(tmp_path / "data") == whole


@needs_datatrove
def test_options_of_a_cluster_that_are_wrong_are_named(source, slurm, tmp_path, monkeypatch):
    for options, said in (
        ({"time": "1:00"}, "needs --engine-option partition="),
        ({**slurm.options, "colour": "red"}, "unexpected keyword argument 'colour'"),
    ):
        with pytest.raises(UserError, match=said):
            build(source, tmp_path / "data", engine=Engine("slurm", None, options), **OPTIONS)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs the command sbatch, which is not here"):
        build(source, tmp_path / "data", engine=slurm, **OPTIONS)


def test_without_datatrove_a_cluster_is_refused_in_one_line(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.utils.logging", None)
    for name in ("slurm", "ray"):
        with pytest.raises(UserError, match=rf"--engine {name} .* pip install 'cognica-poe\[cluster\]'"):
            build(source, tmp_path / "data", engine=Engine(name), **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_words_that_are_no_engine_option():
    with pytest.raises(UserError, match=r"--engine-option 'partition' must read key=value"):
        Engine.of("slurm", None, ["partition"])
    with pytest.raises(UserError, match="is for --engine slurm and ray"):
        Engine.of("local", 2, ["a=b"])
    assert Engine.of("ray", 3, ["a=b=c"]).options == {"a": "b=c"}
