"""Compiled blocks stay compiled in training whatever is computed in between; the numbers of a release are eager."""

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.utils import counters

from cognica_poe import pipeline
from cognica_poe.errors import UserError
from cognica_poe.training import compilation
from cognica_poe.training.trainer import Trainer
from tests.runs import small_recipe, write_texts


@pytest.fixture
def dynamo(monkeypatch):
    """Dynamo without a compiler behind it; counts what it captures."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def prepared(tmp_path):
    recipe = small_recipe(write_texts(tmp_path / "texts"), steps=4, compile="on", checkpoint_every=4)
    recipe = dataclasses.replace(recipe, release=dataclasses.replace(recipe.release, every=2, log_steps=True))
    pipeline.prepare(recipe, tmp_path / "run", lambda line: None)
    return recipe, tmp_path / "run"


def evaluate(model):
    """Passes of a release: other batches and lengths than training, with and without a cache."""
    with torch.no_grad():
        for rows, length in ((1, 20), (2, 33), (3, 64)):
            ids = torch.arange(rows * length).view(rows, length) % model.config.vocab_size
            model.all_logits(ids)
            model.forward_aggregated(ids)
        return model.generate(ids[:1, :30], attention_mask=torch.ones(1, 30, dtype=torch.int64), max_new_tokens=6)


def test_releases_make_no_graph_and_training_keeps_its_own(prepared, dynamo):
    recipe, run = prepared
    trainer, seen = Trainer(recipe, run, pipeline.open_rows(run, recipe)), []
    before = dynamo()

    def release(step):
        made = dynamo() - before
        evaluate(trainer.model)
        assert dynamo() - before == made, "a release compiled something"
        assert not trainer.model.training and trainer.model.config._attn_implementation == "sdpa"
        seen.append(made)

    trainer.train(release)
    assert trainer.releases == [0, 1, 2, 4]
    print(f"graphs made before the releases of steps {trainer.releases}: {seen}")
    assert seen[0] == 0 < seen[1] == seen[2] == seen[3]
    assert trainer.model.training
    with pytest.raises(AssertionError, match="compiled something"):  # what the context keeps away
        evaluate(trainer.model)
        assert dynamo() - before == seen[-1], "a release compiled something"


def test_more_graphs_than_dynamo_keeps_end_a_run_with_one_line(prepared, dynamo, monkeypatch):
    recipe, run = prepared
    monkeypatch.setattr(compilation, "MOST_GRAPHS", 1)
    with pytest.raises(UserError, match=r"made 1 graphs of a block .* --training.compile off") as caught:
        Trainer(recipe, run, pipeline.open_rows(run, recipe)).train()
    assert "\n" not in str(caught.value)


def test_a_release_computes_as_whoever_loads_it(prepared, dynamo):
    recipe, run = prepared
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe))
    trainer.start()
    trainer.replica.attention = "eager"
    trainer.model.set_attn_implementation("eager")
    with trainer.replica.as_released():
        assert trainer.model.config._attn_implementation == "sdpa" and not trainer.model.training
    assert trainer.model.config._attn_implementation == "eager" and trainer.model.training
