"""Data, tokenizer, recipe and checkpoints that do not belong together are refused by name, and nothing is written."""

import dataclasses
import json
import shutil

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.data.build import build
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.data.tokenizer import train_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.recipe.stored import fixed_sha256, load_recipe, save_recipe
from cognica_poe.training.checkpoint import Checkpoint, CheckpointFolder
from cognica_poe.training.lineage import require_parts
from tests.runs import small_recipe, with_training, write_texts


def silent(line):
    pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    recipe = small_recipe(write_texts(folder / "texts"))
    pipeline.prepare(recipe, folder / "run", silent)
    return recipe, folder / "run"


@pytest.fixture
def run(prepared, tmp_path):
    return shutil.copytree(prepared[1], tmp_path / "run")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(recipe, run, **arguments):
    """What ``prepare`` says; it changes nothing."""
    before = contents(run)
    with pytest.raises(UserError) as caught:
        pipeline.prepare(recipe, run, silent, **arguments)
    assert "\n" not in str(caught.value) and contents(run) == before
    return str(caught.value)


def test_a_prepared_run_goes_on(prepared, run):
    recipe = prepared[0]
    pipeline.prepare(recipe, run, silent)
    parts = require_parts(run, recipe)
    assert parts["data"] == load_manifest(run / "data").sha256 and set(parts) == {"recipe", "data", "tokenizer"}


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 5), ("val_fraction", 0.1), ("val_min_bytes", 10_000), ("max_bytes", 200_000)]
)
def test_data_that_the_recipe_does_not_ask_for(prepared, run, field, value):
    recipe = prepared[0]
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **{field: value}))
    (run / "recipe.json").unlink()
    option = f"data.{field.replace('_', '-')}"
    expected = f"the recipe's {option} is {value}: use another --out, or remove {run / 'data'} to build it"
    assert expected in refusal(other, run)
    shutil.rmtree(run / "data")
    shutil.rmtree(run / "tokenizer")
    pipeline.prepare(other, run, silent)  # what the message asks for


def test_a_mix_of_another_name(prepared, run, tmp_path):
    recipe, texts = prepared[0], write_texts(tmp_path / "prose")
    (run / "recipe.json").unlink()
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mix=str(texts)))
    assert "was built with mix texts, the recipe's data.mix is prose" in refusal(other, run)
    gone = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mix=str(tmp_path / "gone.json")))
    require_parts(run, gone)  # the mix file need not be there for ever


def test_a_tokenizer_with_other_ids(prepared, run, tmp_path):
    recipe = prepared[0]
    (run / "recipe.json").unlink()
    larger = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=500))
    assert "has 400 ids, the recipe's model.vocab-size is 500" in refusal(larger, run)
    shutil.rmtree(run / "data")  # found before data is built
    assert "has 400 ids" in refusal(larger, run)


def test_a_tokenizer_of_other_data(prepared, run, tmp_path):
    recipe = prepared[0]
    build(recipe.data.mix, tmp_path / "data", seed=9, val_min_bytes=20_000)
    texts = (document.text for document in read_documents(tmp_path / "data", "train"))
    other = {"data": load_manifest(tmp_path / "data").sha256}
    train_tokenizer(texts, 400, run / "tokenizer", made_from=other)
    message = refusal(recipe, run, resume=True)
    digest = load_manifest(run / "data").sha256
    assert f"{run / 'tokenizer'} was made from data {other['data'][:12]}, this run has data {digest[:12]}" in message
    train_tokenizer((document.text for document in read_documents(tmp_path / "data", "train")), 400, run / "tokenizer")
    assert f"{run / 'tokenizer'} was made from no data" in refusal(recipe, run, resume=True)


def test_an_edited_recipe(prepared, run):
    recipe, file = prepared[0], run / "recipe.json"
    sealed = json.loads(file.read_text())
    edited = {**sealed, "model": {**sealed["model"], "poe_alpha": 0.5}}
    for values, words in (
        (edited, "was changed after it was written"),
        ({key: value for key, value in edited.items() if key != "sha256"}, "carries no sha256"),
    ):
        file.write_text(json.dumps(values))
        assert f"recipe {file} {words}" in refusal(recipe, run, resume=True)
        with pytest.raises(UserError, match=words):
            pipeline.read_recipe(run)
    file.unlink()
    pipeline.prepare(recipe, run, silent, resume=True)  # what the message asks for
    assert json.loads(file.read_text()) == sealed


def test_a_recipe_that_a_user_wrote_needs_no_seal(prepared, tmp_path):
    recipe, file = prepared[0], tmp_path / "mine.json"
    file.write_text(json.dumps(dataclasses.asdict(recipe)))
    assert load_recipe(file) == recipe
    save_recipe(recipe, file)
    file.write_text(file.read_text().replace('"steps": 12', '"steps": 13'))
    with pytest.raises(UserError, match=r"was changed after it was written: .* remove its line sha256"):
        load_recipe(file)
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"}))
    assert load_recipe(file).training.steps == 13


def test_the_identity_of_a_recipe_is_what_a_resumed_run_may_not_change(prepared):
    recipe = prepared[0]
    same = with_training(dataclasses.replace(recipe, name="other"), steps=20, micro_rows=1, checkpoint_every=1)
    assert fixed_sha256(same) == fixed_sha256(recipe)
    for changed in (
        with_training(recipe, batch_rows=8),
        with_training(recipe, seed=1),
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, poe_alpha=0.5)),
        dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, case_aug_prob=0.0)),
    ):
        assert fixed_sha256(changed) != fixed_sha256(recipe)


@pytest.mark.parametrize("part", ["recipe", "data", "tokenizer"])
def test_a_checkpoint_of_something_else(prepared, run, part):
    recipe = prepared[0]
    weights = {"w": torch.zeros(2)}
    made_from = {**require_parts(run, recipe), part: "ab" * 32}
    folder = CheckpointFolder(run / "checkpoints")
    folder.save(Checkpoint(3, weights, weights, {}, made_from))
    assert folder.load(3).made_from == made_from
    with pytest.raises(UserError, match=f"step-3 was made from {part} abababababab, this run has {part} "):
        pipeline.checkpoint_model(run, recipe, 3)
