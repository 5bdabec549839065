"""What a user sees: the whole life of a small model through the command line, and one clear line for each mistake."""

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest

from cognica_poe import pipeline
from cognica_poe.cli.data import build_data
from cognica_poe.cli.main import parse
from cognica_poe.cli.release import export, publish, report
from cognica_poe.cli.tokenizer import train_tokenizer
from cognica_poe.data.build import build
from cognica_poe.data.manifest import load_manifest
from cognica_poe.errors import UserError
from cognica_poe.recipe.fields import DataRecipe
from cognica_poe.recipe.named import RECIPES, find_recipe
from cognica_poe.recipe.stored import save_recipe
from tests.runs import small_recipe, write_texts

LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
where = dict(revision="step-6", cache_dir=sys.argv[1], local_files_only=True, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("test/small", **where)
tokenizer = AutoTokenizer.from_pretrained("test/small", **where)
inputs = tokenizer("def", return_tensors="pt")
assert inputs.input_ids[0, 0] == tokenizer.bos_token_id
model.generate(**inputs, max_new_tokens=3, do_sample=False)
"""


def call(*arguments, **kwargs):
    command = [sys.executable, "-m", "cognica_poe.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **kwargs)


def fails(*arguments, says: str, **kwargs):
    """The call exits with 2 and one line on stderr that holds ``says``; the lines before it are progress."""
    done = call(*arguments, **kwargs)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cognica-poe: ") and says in last, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("life")
    save_recipe(small_recipe(write_texts(folder / "texts")), folder / "recipe.json")
    done = call("run", folder / "recipe.json", "--out", folder / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert [sample["mode"] for sample in json.loads(done.stdout)["samples"]] == [
        "full",
        "prefix",
        "wand",
        "speculative",
    ]
    return folder / "run"


def test_a_run_leaves_the_whole_folder(run):
    for name in ("recipe.json", "data/manifest.json", "tokenizer/tokenizer.json", "metrics.jsonl", "events.jsonl"):
        assert (run / name).is_file(), name
    for step in (6, 12):
        record = json.loads((run / "analysis" / f"step-{step}.json").read_text())
        assert record["step"] == step and len(record["bpb"]["stage"]) == 2 and len(record["wand_bounds"]) == 1
        assert record["baseline"]["xz_bpb"] > 0 and record["validation"]["sha256"]
        config = json.loads((run / "release" / f"step-{step}" / "config.json").read_text())
        assert config["poe_wand_p99_bounds_per_stage_head"] == record["wand_bounds"]
    page = (run / "report" / "index.html").read_text()
    assert "<svg" in page and "http-equiv" in page


def test_a_revision_loads_offline_from_the_local_hub_cache(run):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", LOAD, str(run / "release" / "hub")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_resuming_a_finished_run_changes_nothing(run):
    before = (run / "checkpoints" / "step-12" / "model.safetensors").read_bytes()
    done = call("train", run / "recipe.json", "--out", run, "--resume")
    assert done.returncode == 0, done.stderr
    assert (run / "checkpoints" / "step-12" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("mode", ["full", "prefix", "stage", "wand", "speculative", "parallel"])
def test_generate_in_every_mode(run, mode):
    from cognica_poe import load
    from cognica_poe.serving.generation import generate
    from cognica_poe.serving.options import GenerationOptions

    model, tokenizer = load(run / "release" / "step-12")
    result = generate(model, tokenizer, "import", GenerationOptions(mode=mode, max_new_tokens=5))
    assert result.new_tokens == 5 and result.tokens_per_second > 0
    assert (result.acceptance is not None) == (mode == "speculative")
    assert (result.mean_stages_used is not None) == (mode == "wand")


def test_commands_on_a_finished_run(run, tmp_path):
    done = call("calibrate", run / "release" / "step-12", "--text", run.parent / "texts", "--tokens", "600", "--json")
    assert len(json.loads(done.stdout)["bounds"]) == 1, done.stderr
    assert call("export", run, "--step", "6", "--out", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "MANIFEST.sha256").is_file()
    done = call("data", "which-docs", run, "--step", "0", "--json")
    assert {piece["row"] for piece in json.loads(done.stdout)} == {0, 1, 2, 3}
    assert call("report", run, "--out", tmp_path / "page.html").returncode == 0


FOREIGN = {
    "documents": lambda out, run: (
        (out / "deep").mkdir(parents=True),
        (out / "deep" / "thesis.txt").write_text("mine"),
    ),
    "model": lambda out, run: (
        shutil.copytree(run / "release" / "step-6", out),
        (out / "MANIFEST.sha256").unlink(),
        (out / "manifest.json").write_text("{}"),
    ),
    "other kind": lambda out, run: shutil.copytree(run / "checkpoints" / "step-6", out),
    "file": lambda out, run: out.write_text("mine"),
    "link": lambda out, run: out.symlink_to(run / "release" / "step-6"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_out_never_replaces_what_is_not_ours(run, tmp_path, name):
    out = tmp_path / "out"
    FOREIGN[name](out, run)
    before = contents(tmp_path), contents(run)
    for kind, call in {
        "release": lambda: export(run, 6, out),
        "data": lambda: build_data(str(run.parent / "texts"), out),
        "tokenizer": lambda: train_tokenizer(run / "data", out, 400),
    }.items():
        with pytest.raises(UserError, match=f"out exists and is not a {kind} folder made by cognica-poe"):
            call()
    assert (contents(tmp_path), contents(run)) == before


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_out_leaves_the_input_alone(run):
    before = contents(run.parent)
    for part in (
        "data",
        "tokenizer",
        "checkpoints/step-6",
        "checkpoints/step-7",
        "analysis/x",
        "data/x",
        "release/hub/x",
        ".",
    ):
        with pytest.raises(UserError, match=r"choose another --out$"):
            export(run, 6, run / part)
    with pytest.raises(UserError, match="lies inside"):
        export(run, 6, run / "release" / "step-12" / "x")
    with pytest.raises(UserError, match="lies inside"):
        build_data(str(run.parent / "texts"), run.parent / "texts" / "data")
    for part in ("data", "analysis/x", "."):
        with pytest.raises(UserError, match=r"choose another --out$"):
            publish(run, f"file:{run / part}")
        with pytest.raises(UserError, match=r"choose another --out$"):
            report((run,), run / part)
    for out in (run / "data", run / "data" / "x", run):
        with pytest.raises(UserError, match=r"is what is read|lies inside|holds"):
            train_tokenizer(run / "data", out, 400)
    assert contents(run.parent) == before


def test_out_is_looked_at_before_any_work(run, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("years of work")
    work = {
        "cognica_poe.pipeline.checkpoint_model": lambda: export(run, 6, tmp_path),
        "cognica_poe.data.engine.plan.local_files": lambda: build_data(str(run.parent / "texts"), tmp_path),
        "cognica_poe.data.manifest.load_manifest": lambda: train_tokenizer(run / "data", tmp_path, 400),
    }
    for name, call in work.items():
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("work began"))
        with pytest.raises(UserError, match="made by cognica-poe: choose another --out, or remove it yourself"):
            call()


def test_data_build_and_a_recipe_give_the_same_data(run, tmp_path, capsys):
    recipe = find_recipe(str(run / "recipe.json"))
    for max_bytes in (None, 120_000):
        data = dataclasses.replace(recipe.data, max_bytes=max_bytes, seed=5)
        pipeline.prepare(dataclasses.replace(recipe, data=data), tmp_path / f"run-{max_bytes}", print)
        options = ["--val-min-bytes", data.val_min_bytes, "--seed", data.seed]
        options += [] if max_bytes is None else ["--max-bytes", max_bytes]
        done = call("data", "build", data.mix, "--out", tmp_path / f"data-{max_bytes}", *options)
        assert done.returncode == 0, done.stderr
        built, prepared = (load_manifest(tmp_path / name) for name in (f"data-{max_bytes}", f"run-{max_bytes}/data"))
        assert built == prepared and built.shards
        assert (max_bytes is None) == ("over max_bytes" not in built.dropped)


def test_data_build_has_the_defaults_of_a_recipe():
    defaults = DataRecipe()
    for function in (build_data, build):
        for name in ("val_fraction", "val_min_bytes", "max_bytes", "seed"):
            assert inspect.signature(function).parameters[name].default == getattr(defaults, name), (function, name)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/x", "..", "a/b", "a\\b", ""])
def test_a_recipe_name_that_leads_elsewhere(tmp_path, name):
    recipe = dataclasses.replace(RECIPES["tiny"], name=name)
    save_recipe(recipe, tmp_path / "recipe.json")
    for command in ("run", "train"):
        with pytest.raises(UserError, match=r"recipe name .* cannot be used as a name on disk"):
            parse([command, str(tmp_path / "recipe.json")])
    if name.startswith(".."):
        fails("run", tmp_path / "recipe.json", says="recipe name", cwd=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_mistakes_in_names_and_numbers(tmp_path):
    fails("run", "tinny", says="did you mean 'tiny'")
    fails("run", "tiny", "--out", tmp_path / "r", "--training.steps", "-5", says="training.steps is -5")
    fails("flie", says="unknown command 'flie'")
    fails("analyze", tmp_path, says="not a run folder")
    fails("generate", tmp_path / "nothing", "Hi", says="no release folder")
    bad = tmp_path / "bad.json"
    bad.write_text('{"name": "x", "modle": {}}')
    fails("params", bad, says="modle")
    assert not (tmp_path / "r").exists()


def test_mistakes_in_data(tmp_path):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.mkdir(), binary.mkdir()
    (binary / "a.txt").write_bytes(b"\x00\x01\xff" * 1000)
    fails("data", "build", empty, "--out", tmp_path / "o1", says="empty")
    fails("data", "build", binary, "--out", tmp_path / "o2", says="a.txt")
    fails("data", "build", tmp_path / "missing", "--out", tmp_path / "o3", says="missing")
    assert not list(tmp_path.glob("o*"))


def test_a_prompt_longer_than_the_context(run):
    fails("generate", run / "release" / "step-12", "word " * 200, says="context")


def test_corrupt_weights(run, tmp_path):
    copy = tmp_path / "step-12"
    shutil.copytree(run / "release" / "step-12", copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    fails("generate", copy, "Hi", says="model.safetensors")


def test_a_full_disk_leaves_nothing_half_written(run, tmp_path):
    """Files may not grow past 64 kB here, which the kernel refuses like a full disk."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))

    out = tmp_path / "out"
    fails("export", run, "--step", "6", "--out", out, says="no space left", preexec_fn=limit)
    assert not list(tmp_path.iterdir())
