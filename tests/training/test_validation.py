"""Validation while training: the same figures on any number of ranks, those of the record, and none of training's."""

import dataclasses
import json
import shutil

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.analysis.bits_per_byte import measure_paths
from cognica_poe.analysis.in_training import FixedSlice
from cognica_poe.analysis.validation import validation_slice
from cognica_poe.data.manifest import read_documents
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.errors import TrainingStopped, UserError
from cognica_poe.recipe.fields import RanksRecipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.recipe.rules import check_run
from cognica_poe.release import history
from cognica_poe.training.build import build_model
from cognica_poe.training.checkpoint import CheckpointFolder
from cognica_poe.training.journal import read_records
from cognica_poe.training.trainer import Trainer
from cognica_poe.training.validation import MOST_OF_TIME, WORK, slice_bytes, steps_between
from tests.gloo import run_ranks
from tests.runs import small_recipe, with_training, write_texts

EVAL = {"eval_every": 4, "eval_max_bytes": 3000}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation")
    recipe = small_recipe(write_texts(folder / "texts"), compute_dtype="float32", **EVAL)
    pipeline.prepare(recipe, folder / "run", lambda line: None)
    pipeline.open_rows(folder / "run", recipe).facts(0)
    return folder / "run"


def train(ranks, run, changes=None, resume=False, stop_at=None):
    recipe = with_training(pipeline.read_recipe(run), **(changes or {}))
    validation = pipeline.validation_of(run, recipe, ranks)

    def progress(step, metrics):
        if step == stop_at:
            (run / "stop").write_text("")

    rows = pipeline.open_rows(run, recipe)
    try:
        Trainer(recipe, run, rows, resume=resume, ranks=ranks, validation=validation, progress=progress).train()
    except TrainingStopped:
        assert stop_at is not None


def rows_of(run):
    return history.validations(history.by_step(read_records(run / "metrics.jsonl")))


def figures(run):
    return [{key: row[key] for key in ("step", "full", "stage", "prefix", "plain")} for row in rows_of(run)]


@pytest.mark.parametrize("mode", ["flat", "none"])
def test_any_number_of_ranks_gives_the_figures_of_the_record(prepared, mode):
    recipe = small_recipe(prepared.parent / "texts", mode)
    model, tokenizer = build_model(recipe.model, seed=3).eval(), load_tokenizer(prepared / "tokenizer")
    part = validation_slice((d.text for d in read_documents(prepared / "data", "val")), 6000)
    fixed = FixedSlice(part, tokenizer, model.config, batch_rows=3)
    found = [fixed.figures([fixed.share(model, rank, world) for rank in range(world)]) for world in (1, 2, 3, 5)]
    assert all(one == found[0] for one in found), "bit for bit"
    sums = measure_paths(model, tokenizer, part.texts, batch_rows=3).sums
    bits = {path: float(nats.sum()) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item() / sums.bytes.sum()
            for path, nats in sums.nats.items()}  # fmt: skip
    assert found[0]["full"] == pytest.approx(bits["full"], rel=1e-13)
    assert found[0]["plain"] == pytest.approx(bits["plain"], rel=1e-13)
    for kind in ("stage", "prefix"):
        assert found[0][kind] == pytest.approx([bits[f"{kind}{k}"] for k in range(sums.stages)], rel=1e-13)
    assert fixed.facts["sha256"] == part.sha256 and fixed.tokens == sums.targets.sum()


def test_a_run_is_measured_where_it_says_and_trains_as_without(prepared, tmp_path):
    runs = {name: shutil.copytree(prepared, tmp_path / name) for name in ("with", "without", "two", "stopped")}
    run_ranks(1, train, runs["with"])
    run_ranks(1, train, runs["without"], {"eval_every": 0})
    run_ranks(2, train, runs["two"])
    run_ranks(1, train, runs["stopped"], None, False, 8)
    run_ranks(1, train, runs["stopped"], None, True)
    assert [row["step"] for row in rows_of(runs["with"])] == [4, 8, 12] and not rows_of(runs["without"])
    weights = {name: CheckpointFolder(run / "checkpoints").load(12).weights for name, run in runs.items()}
    assert all(torch.equal(value, weights["without"][name]) for name, value in weights["with"].items())
    assert figures(runs["stopped"]) == figures(runs["with"]), "stopped and resumed"
    for one, two in zip(figures(runs["with"]), figures(runs["two"]), strict=True):
        assert two["full"] == pytest.approx(one["full"], rel=1e-5), "training itself differs by rounding"
        assert two["stage"] == pytest.approx(one["stage"], rel=1e-5)
    values = [row["full"] for row in rows_of(runs["with"])]
    events = [json.loads(line) for line in (runs["with"] / "events.jsonl").read_text().splitlines()]
    minima = [(event["step"], event["bpb"]) for event in events if event["event"] == "new minimum"]
    assert minima == history.minima(rows_of(runs["with"])) and minima[0] == (4, values[0])
    merged = history.by_step(read_records(runs["with"] / "metrics.jsonl"))
    assert all("lr_scale" in row and "loss" in row for row in merged)


def test_the_history_ends_with_the_releases_record(prepared, tmp_path):
    run = shutil.copytree(prepared, tmp_path / "run")
    recipe = pipeline.read_recipe(run)
    recipe = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, val_max_bytes=3000))
    run_ranks(1, train, run)
    model = pipeline.checkpoint_model(run, pipeline.read_recipe(run), 12)
    record = pipeline.analyze_step(run, recipe, model, 12, lambda line: None)
    last = rows_of(run)[-1]
    assert last["sha256"] == record.validation.sha256
    assert last["full"] == pytest.approx(record.bpb.full, rel=1e-12)
    assert last["stage"] == pytest.approx(record.bpb.stage, rel=1e-12)
    about = pipeline.describe(run, recipe, 12)
    assert about["progress"]["validation_bpb"] == last["full"]
    assert [row["step"] for row in about["validation_in_training"]["rows"]] == [4, 8, 12]
    assert 0.0 < about["validation_in_training"]["share_of_time"] < 1.0


def test_validation_keeps_to_its_share_of_the_work():
    for recipe in RECIPES.values():
        size = slice_bytes(recipe)
        assert size is not None and size <= (recipe.release.val_max_bytes or size)
        for bytes_of_a_token in (2.0, 3.0, 4.5):
            tokens = int(size / bytes_of_a_token)
            every = steps_between(recipe, tokens)
            if every == 0:
                continue
            batch = recipe.training.batch_rows * recipe.model.max_position_embeddings
            assert WORK * tokens <= MOST_OF_TIME * every * batch
            assert recipe.release.every % every == 0 or every % recipe.release.every == 0
    assert steps_between(RECIPES["3b"], 5_000_000) == 1000 and steps_between(RECIPES["tiny"], 10**6) == 0


def test_what_a_recipe_asks_for_is_done_or_refused(prepared):
    recipe = pipeline.read_recipe(prepared)
    assert steps_between(recipe, 10**9) == 4 and slice_bytes(recipe) == 3000
    assert pipeline.validation_of(prepared, with_training(recipe, eval_every=0)).every == 0
    staged = with_training(recipe, ranks=RanksRecipe(parallel="stages"))
    with pytest.raises(UserError, match=r"training\.eval-every needs training\.ranks\.parallel rows"):
        check_run(staged)
    check_run(with_training(staged, eval_every=None))
    assert steps_between(with_training(staged, eval_every=None), 10) == 0
