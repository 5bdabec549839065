"""The commands of docs/launch.md are commands that exist."""

import re
import shlex
from pathlib import Path

import pytest

from cognica_poe import cli, commands

DOCUMENT = Path(__file__).parent.parent / "docs" / "launch.md"


def documented():
    """Arguments of every cognica-poe command in the code blocks, launchers taken off."""
    blocks = re.findall(r"```\w*\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        match = re.search(r"(?:^cognica-poe|-m cognica_poe\.cli) (.*)", line)
        if match:
            yield [word for word in shlex.split(match[1]) if not word.startswith("$RESUME")]


COMMANDS = list(documented())


def test_the_document_shows_commands():
    assert {arguments[0] for arguments in COMMANDS} == {"plan", "train", "data", "tokenizer"}


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_documented_commands_parse(arguments, monkeypatch):
    called = []
    for name, command in commands.RECIPE_COMMANDS.items():
        fake = commands.RecipeCommand(lambda given: called.append(given), "", "", command.default)
        monkeypatch.setitem(cli.RECIPE_COMMANDS, name, fake)
    for name, function in commands.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, _recorder(function, called))
    cli.dispatch(arguments)
    assert len(called) == 1
    if hasattr(called[0], "recipe"):
        called[0].recipe.check()


def _recorder(function, called):
    import functools

    @functools.wraps(function)
    def record(*args, **kwargs):
        called.append((args, kwargs))

    return record


def test_the_table_holds_the_recipes_values():
    """Every number of the 3B table is what the recipe computes."""
    from cognica_poe.cluster import Cluster
    from cognica_poe.plan import make_plan
    from cognica_poe.recipes import RECIPES

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
