"""A run goes on: longer than planned, or from the weights of another one."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cognica_poe import pipeline
from cognica_poe.cli.main import main
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, write_manifest
from cognica_poe.recipe.named import RECIPES
from cognica_poe.recipe.stored import save_recipe
from cognica_poe.training.initial import initial_weights, read_origin
from cognica_poe.training.objective import Objective
from cognica_poe.training.trainer import Trainer
from tests.gloo import run_ranks
from tests.runs import small_recipe, with_training, write_texts

TINY = RECIPES["tiny"].training


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


def constant(texts, steps, ratio=0.0):
    """A recipe whose rates do not look at its length before the warm-down, which its last ``ratio`` of steps are."""
    schedule = dataclasses.replace(TINY.schedule, warmup_steps=4, warmdown_ratio=ratio)
    optimizer = dataclasses.replace(TINY.optimizer, weight_decay=0.0)
    return small_recipe(
        texts, steps=steps, schedule=schedule, optimizer=optimizer, compute_dtype="float32", checkpoint_every=10
    )


def command(*words):
    main([str(word) for word in words])


def tensors(run, step, part="model"):
    return load_file(run / "checkpoints" / f"step-{step}" / f"{part}.safetensors")


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss_stages"] for line in lines]


def events(run, kind):
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def test_forty_steps_extended_to_sixty_equal_sixty(texts, tmp_path, capsys):
    """Also with a warm-down that begins where the shorter run ended: the warm-down of one that was planned so."""
    third = 1 / 3
    save_recipe(constant(texts, 60, third), tmp_path / "whole.json")
    save_recipe(constant(texts, 40), tmp_path / "short.json")
    whole, run = tmp_path / "whole", tmp_path / "run"
    command("train", tmp_path / "whole.json", "--out", whole)
    command("train", tmp_path / "short.json", "--out", run)
    longer = ("--training.steps", 60, "--training.schedule.warmdown-ratio", third)
    command("train", tmp_path / "short.json", "--out", run, "--resume", *longer)
    capsys.readouterr()
    for part in ("model", "optimizer"):
        first, second = tensors(whole, 60, part), tensors(run, 60, part)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert losses(whole) == losses(run) and len(losses(run)) == 60
    (changed,) = events(run, "recipe changed")
    assert changed["step"] == 40
    assert {name: change["after"] for name, change in changed["changes"].items()} == {
        "training.steps": 60,
        "training.schedule.warmdown-ratio": third,
    }


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    """A run of six steps with a release of its last one."""
    recipe = small_recipe(texts, steps=6, compute_dtype="float32")
    run = tmp_path_factory.mktemp("source") / "run"
    pipeline.run_recipe(recipe, run, resume=False, log=lambda line: None, progress=lambda step, metrics: None)
    return run


def start(recipe, run, init_from, **options):
    pipeline.prepare(recipe, run, lambda line: None, init_from=init_from, **options)
    return Trainer(recipe, run, pipeline.open_rows(run, recipe), **options)


def evaluate(recipe, run, weights):
    """Losses ``[K]`` of weights on the rows of a run's first step."""
    model = pipeline.build_model(recipe.model)
    model.load_state_dict(weights)
    batch = torch.from_numpy(pipeline.open_rows(run, recipe).batch(0, recipe.training.batch_rows))
    parts = [
        Objective(model.train()).backward(rows[:, :-1], rows[:, 1:], 1.0)
        for rows in batch.split(recipe.training.micro_rows)
    ]
    return torch.stack(parts).mean(0)


@pytest.mark.parametrize("kind", ["release", "checkpoint"])
def test_a_run_from_weights_starts_at_their_loss(source, texts, tmp_path, kind):
    place = source / ("release" if kind == "release" else "checkpoints") / "step-6"
    recipe, run = small_recipe(texts, steps=3, compute_dtype="float32"), tmp_path / "run"
    trainer = start(recipe, run, place)
    trainer.train()
    expected = evaluate(recipe, run, tensors(source, 6))
    torch.testing.assert_close(torch.tensor(losses(run)[0]), expected, rtol=1e-6, atol=0)
    assert losses(run)[0] < losses(source)[0]
    tokenizers = [folder / "tokenizer" / "tokenizer.json" for folder in (source, run)]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()
    state = tensors(run, 3, "optimizer")
    assert {float(value) for name, value in state.items() if name.endswith(".step")} == {3.0}, "state began anew"
    origin = read_origin(run)
    assert (origin.step, len(origin.sha256)) == (6, 64) and str(tmp_path) not in str(origin)
    assert events(run, "weights taken over")[0]["from"] == dataclasses.asdict(origin)


def test_such_a_run_needs_its_source_no_more_and_says_where_it_began(source, texts, tmp_path):
    recipe, run = small_recipe(texts, steps=4, compute_dtype="float32", checkpoint_every=2), tmp_path / "run"
    moved = shutil.copytree(source, tmp_path / "moved")
    pipeline.prepare(recipe, run, lambda line: None, init_from=moved / "checkpoints" / "step-6")
    shutil.rmtree(moved)  # not one step was made
    whole = start(recipe, tmp_path / "whole", source / "checkpoints" / "step-6")
    whole.train()
    lines = []
    pipeline.prepare(recipe, run, lines.append, resume=True, init_from=moved / "checkpoints" / "step-6")
    assert any("is gone" in line and "has kept the weights" in line for line in lines)
    steps = pipeline.run_recipe(recipe, run, resume=True, log=lines.append, progress=lambda step, metrics: None)
    first, second = tensors(tmp_path / "whole", 4), tensors(run, 4)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    about = json.loads((run / "release" / f"step-{steps[-1]}" / "release.json").read_text())
    assert about["started_from"] == dataclasses.asdict(read_origin(run))


def on_ranks(ranks, recipe, run):
    trainer = Trainer(recipe, run, pipeline.open_rows(run, recipe), ranks=ranks)
    trainer.train()


def test_two_ranks_start_from_weights_and_their_checkpoint_is_a_source(source, texts, tmp_path):
    recipe = small_recipe(texts, steps=2, compute_dtype="float32")
    for name, init_from in (("run", source / "release" / "step-6"), ("next", tmp_path / "run/checkpoints/step-2")):
        pipeline.prepare(recipe, tmp_path / name, lambda line: None, init_from=init_from)
        run_ranks(2, on_ranks, recipe, tmp_path / name)
    expected = evaluate(recipe, tmp_path / "run", tensors(source, 6))
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "run")[0]), expected, rtol=1e-5, atol=0)
    weights = dict(initial_weights(tmp_path / "next").items())
    expected = evaluate(recipe, tmp_path / "next", weights)
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "next")[0]), expected, rtol=1e-5, atol=0)


def no_source(place):
    shutil.rmtree(place)


def another_tensor(place):
    weights = load_file(place / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].contiguous()
    save_file(weights, place / "model.safetensors")
    write_manifest(place, "checkpoint", Manifest.parse((place / MANIFEST).read_bytes(), place).made_from)


def not_finite(place):
    weights = load_file(place / "model.safetensors")
    weights["lm_head.weight"][0, 0] = float("nan")
    save_file(weights, place / "model.safetensors")
    write_manifest(place, "checkpoint", Manifest.parse((place / MANIFEST).read_bytes(), place).made_from)


def flipped(place):
    data = bytearray((place / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "model.safetensors").write_bytes(data)


SPOILT = {
    "neither a release folder nor a checkpoint folder": no_source,
    r"lm_head.weight has shape \[400, 31\], not \[400, 32\]": another_tensor,
    "lm_head.weight is not finite": not_finite,
    "model.safetensors is corrupt": flipped,
}


@pytest.mark.parametrize("words", SPOILT)
def test_a_source_that_cannot_be_gone_on_from_is_refused(source, texts, tmp_path, words):
    there = shutil.copytree(source, tmp_path / "there")
    place = there / "checkpoints" / "step-6"
    SPOILT[words](place)
    with pytest.raises(UserError, match=words) as caught:
        pipeline.prepare(small_recipe(texts), tmp_path / "run", lambda line: None, init_from=place)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["release", "checkpoints"])
def test_another_shape_is_refused_by_the_name_of_the_field(source, texts, tmp_path, kind):
    recipe = small_recipe(texts)
    for field, value in (("head_dim", 8), ("poe_stage_layers", (1, 2)), ("vocab_size", 500), ("window_pattern", "L")):
        other = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **{field: value}))
        with pytest.raises(UserError, match=f"model.{field.replace('_', '-')} is .* there and .* in this recipe"):
            pipeline.prepare(other, tmp_path / "run", lambda line: None, init_from=source / kind / "step-6")
    assert not (tmp_path / "run").exists()


def test_a_run_that_began_otherwise_does_not_take_weights_over(source, texts, tmp_path):
    recipe, run = small_recipe(texts, steps=3), tmp_path / "run"
    start(recipe, run, source / "checkpoints" / "step-6").train()
    again = source / "checkpoints" / "step-3"
    with pytest.raises(UserError, match=r"started from small-test, step 6: --init-from .* is for a new run"):
        pipeline.prepare(recipe, run, lambda line: None, resume=True, init_from=again)
    longer = with_training(recipe, steps=5)
    start(longer, run, source / "checkpoints" / "step-6", resume=True).train()
    fresh = tmp_path / "fresh"
    pipeline.prepare(recipe, fresh, lambda line: None)
    Trainer(recipe, fresh, pipeline.open_rows(fresh, recipe)).train()
    with pytest.raises(UserError, match="started without those weights"):
        pipeline.prepare(recipe, fresh, lambda line: None, resume=True, init_from=again)


def test_damage_of_what_was_taken_over_is_named(source, texts, tmp_path):
    recipe, run = small_recipe(texts, steps=3), tmp_path / "run"
    trainer = start(recipe, run, source / "checkpoints" / "step-6")
    assert {file.name for file in (run / "initial").iterdir()} == {
        MANIFEST,
        "model.safetensors",
        "origin.json",
        "tokenizer.json",
    }
    flipped(run / "initial")
    with pytest.raises(UserError, match=r"initial/model\.safetensors is corrupt"):
        trainer.start()
