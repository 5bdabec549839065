"""The commands of docs/launch.md are commands that exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cognica_poe.cli import main as cli
from cognica_poe.recipe.rules import check
from cognica_poe.recipe.stored import save_recipe

DOCUMENT = Path(__file__).parents[3] / "docs" / "launch.md"


def documented():
    """Arguments of every cognica-poe command in the code blocks, launchers taken off."""
    blocks = re.findall(r"```\w*\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        match = re.search(r"(?:^cognica-poe|-m cognica_poe\.cli) (.*)", line)
        if match:
            yield [word for word in shlex.split(match[1]) if word != "&" and not word.startswith("$RESUME")]


COMMANDS = list(documented())


def test_the_document_shows_commands():
    assert {arguments[0] for arguments in COMMANDS} == {"plan", "train", "data", "tokenizer"}


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_documented_commands_parse(arguments):
    call = cli.parse(arguments)
    if arguments[0] in ("plan", "train"):
        recipe = call.keywords["settings"]
        check(recipe)
        assert recipe.name == arguments[1]


def test_the_table_holds_the_recipes_values():
    """Every number of the 3B table is what the recipe computes."""
    from cognica_poe.planning.cluster import Cluster
    from cognica_poe.planning.plan import make_plan
    from cognica_poe.recipe.named import RECIPES

    recipe, text = RECIPES["3b"], DOCUMENT.read_text()
    totals = {figure.name: figure.value for figure in make_plan(recipe, Cluster(12)).totals}
    optimizer = recipe.training.optimizer
    for number in (
        f"{totals['tokens per step']:,} = {recipe.training.batch_rows} rows",
        f"{totals['tokens']:,} tokens",
        f"from step {totals['warm-down from step']:,} (ratio {recipe.training.schedule.warmdown_ratio})",
        f"matrices {optimizer.matrix_lr}, embeddings {optimizer.embedding_lr}, heads {optimizer.unembedding_lr}",
        f"{optimizer.weight_decay}, cosine",
        f"{recipe.training.schedule.warmup_steps:,} steps",
    ):
        assert number in text, number


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    from tests.runs import small_recipe, write_texts

    folder = tmp_path_factory.mktemp("launch")
    recipe = small_recipe(write_texts(folder / "texts"), micro_rows=1, compute_dtype="float32")
    save_recipe(recipe, folder / "recipe.json")
    return folder / "recipe.json"


def torchrun(ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["-m", "cognica_poe.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_train_under_torchrun_is_one_run(recipe_file, tmp_path):
    """Two ranks make one run folder, print once, resume, and end where one process ends."""
    from cognica_poe.training.checkpoint import CheckpointFolder

    out = tmp_path / "two"
    done = torchrun(2, "train", recipe_file, "--out", out, "--json", "--training.ranks.grad-sync", "last_microbatch")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoints"][-1] == 12
    again = torchrun(2, "train", recipe_file, "--out", out, "--resume")
    assert again.returncode == 0 and again.stdout.count("trained small-test to step 12") == 1, again.stderr
    cli.dispatch(["train", str(recipe_file), "--out", str(tmp_path / "one")])
    one, two = (CheckpointFolder(tmp_path / name / "checkpoints").load(12).weights for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        # In norm: Adam makes a full step of a gradient that is nothing but rounding. Here one element of 6,400 moves by
        # 0.006, which is 2e-4 of its table; the ranks' own tests compare in fp64, where there is no such element.
        assert (two[name] - one[name]).norm() <= 1e-3 * one[name].norm(), name


@pytest.mark.slow
def test_mistakes_under_torchrun_are_one_line(recipe_file, tmp_path):
    done = torchrun(3, "train", recipe_file, "--out", tmp_path / "three")
    assert done.returncode and "cannot be shared by 3 ranks" in done.stderr
    done = torchrun(2, "run", recipe_file, "--out", tmp_path / "life")
    assert done.returncode and "under torchrun use `train`" in done.stderr and not (tmp_path / "life").exists()
