"""A whole run whose ranks own stages."""

import json
import shutil

import pytest

from cognica_poe import pipeline
from cognica_poe.recipe.fields import RanksRecipe
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.trainer import Trainer
from tests.gloo import run_ranks
from tests.runs import small_recipe, with_training, write_texts

STAGES = RanksRecipe(parallel="stages")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    recipe = small_recipe(write_texts(folder / "texts"), compute_dtype="float32")
    pipeline.prepare(recipe, folder / "run", lambda line: None)
    pipeline.open_rows(folder / "run", recipe).facts(0)
    return folder / "run"


def train(ranks, run, distributed, resume, steps=None):
    recipe = pipeline.read_recipe(run)
    recipe = with_training(recipe, ranks=distributed or recipe.training.ranks)
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), resume=resume, ranks=ranks)
    if steps is not None:
        one = trainer._train_step

        def step():
            return one() and trainer.step < steps

        trainer._train_step = step
    try:
        trainer.train()
    except Exception as error:
        assert steps is not None, error


def end(run):
    return CheckpointFolder(run / "checkpoints").load(12)


def test_a_run_by_stages_ends_where_one_process_ends(prepared, tmp_path):
    one, two, both = (shutil.copytree(prepared, tmp_path / name) for name in ("one", "two", "both"))
    run_ranks(1, train, one, None, False)
    run_ranks(2, train, two, STAGES, False)
    run_ranks(2, train, both, STAGES, False, 5)  # interrupted, then by rows, on as many ranks
    run_ranks(2, train, both, RanksRecipe(), True)
    expected = end(one)
    for run in (two, both):
        assert end(run).weights.keys() == expected.weights.keys()
        assert end(run).optimizer.keys() == expected.optimizer.keys()
        for name, value in end(run).weights.items():
            # In norm: Adam makes a visible step of a single gradient that is nothing but rounding.
            assert (value - expected.weights[name]).norm() <= 1e-4 * expected.weights[name].norm(), name
    a, b = ([json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two))
    for x, y in zip(a, b, strict=True):
        assert y["loss_stages"] == pytest.approx(x["loss_stages"], rel=1e-4)
        assert y["gradient_norm"] == pytest.approx(x["gradient_norm"], rel=1e-3)
