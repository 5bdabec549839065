"""Recipes: the named ones are sound and have the card's numbers; files round-trip; mistakes are named in one line."""

import dataclasses
import json

import pytest
import torch

from cognica_poe import pipeline
from cognica_poe.errors import UserError
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import LOG_STEPS
from cognica_poe.recipe.named import RECIPES, find_recipe
from cognica_poe.recipe.rules import check, check_run
from cognica_poe.recipe.stored import recipe_from_dict, save_recipe


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def changed(recipe, path, value):
    """A copy with one dotted field replaced, as the command line does it."""
    head, _, rest = path.partition(".")
    return dataclasses.replace(recipe, **{head: changed(getattr(recipe, head), rest, value) if rest else value})


def values_with(path, value):
    """The tiny recipe's JSON values with one dotted field set."""
    values = json.loads(json.dumps(dataclasses.asdict(RECIPES["tiny"])))
    *heads, last = path.split(".")
    target = values
    for head in heads:
        target = target[head]
    target[last] = value
    return values


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_are_sound(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert check(recipe) is recipe
    CognicaPoEConfig(**dataclasses.asdict(recipe.model))
    steps = recipe.released_steps()
    assert steps == sorted(set(steps)) and steps[-1] == recipe.training.steps


@pytest.mark.parametrize("name", RECIPES)
def test_saved_recipes_read_back_equal(name, tmp_path):
    save_recipe(RECIPES[name], tmp_path / "recipe.json")
    assert find_recipe(str(tmp_path / "recipe.json")) == RECIPES[name]
    assert find_recipe(str(tmp_path)) == RECIPES[name]  # a run folder


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.endswith("-bp")])
def test_the_control_arm_differs_in_objective_and_heads_alone(name):
    pool, plain = RECIPES[name], RECIPES[f"{name}-bp"]
    assert (plain.training, plain.data) == (pool.training, pool.data)
    assert plain.release.repo_id == f"{pool.release.repo_id}-bp"
    differing = {
        field.name
        for field in dataclasses.fields(pool.model)
        if getattr(pool.model, field.name) != getattr(plain.model, field.name)
    }
    assert differing <= {"poe_mode", "poe_stage_layers", "per_stage_head"}
    assert (plain.model.poe_mode, plain.model.per_stage_head) == ("none", False)
    assert plain.model.poe_stage_layers == (pool.model.num_hidden_layers,)


@pytest.mark.parametrize(("name", "count"), [("3b", 3_019_900_506), ("1.5b", 1_507_591_082), ("1.3b", 1_384_122_122)])
def test_parameter_counts_of_the_releases(name, count):
    with torch.device("meta"):
        model = CognicaPoEForCausalLM(CognicaPoEConfig(**dataclasses.asdict(RECIPES[name].model)))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_3b_run_sees_66_billion_tokens():
    recipe = RECIPES["3b"]
    tokens = recipe.training.batch_rows * recipe.model.max_position_embeddings
    assert (recipe.training.batch_rows, tokens) == (384, 786_432)
    assert tokens * recipe.training.steps == 65_999_732_736


@pytest.mark.parametrize("name", ["1.3b", "1.5b", "3b", "1.3b-bp", "1.5b-bp", "3b-bp"])
def test_measuring_the_releases_of_a_large_recipe_reads_little(name):
    recipe = RECIPES[name]
    trained = recipe.training.steps * recipe.training.batch_rows * recipe.model.max_position_embeddings
    measured = len(recipe.released_steps()) * recipe.release.val_max_bytes / 4  # bytes per token, at least
    assert measured < 0.01 * trained


def test_released_steps():
    recipe = changed(changed(RECIPES["tiny"], "release.log_steps", True), "release.every", 120)
    recipe = changed(recipe, "training.steps", 300)
    assert recipe.released_steps() == [*LOG_STEPS[:8], 120, 128, 240, 256, 300]
    assert changed(recipe, "release.log_steps", False).released_steps() == [120, 240, 300]
    assert changed(recipe, "release.every", 1000).released_steps()[-1] == 300


@pytest.mark.parametrize(("typo", "meant"), [("tinny", "tiny"), ("smal", "small"), ("1.5", "1.5b"), ("3bb", "3b")])
def test_a_typo_is_answered_with_the_nearest_name(typo, meant):
    assert f"unknown recipe {typo!r}: did you mean {meant!r}?" in refusal(find_recipe, typo)


def test_an_unknown_name_lists_the_recipes():
    message = refusal(find_recipe, "zzzzzzzz")
    assert "did you mean" not in message
    assert all(name in message for name in RECIPES)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("speed", 3),
        ("training.learning_rate", 0.1),
        ("training.steps", "300"),
        ("training.steps", 1.5),
        ("training.steps", None),
        ("model.poe_mode", "flatt"),
        ("model.poe_stage_layers", ["2", 4]),
        ("model.per_stage_head", "yes"),
        ("training.optimizer.muon_iteration", "newton"),
        ("release", []),
    ],
)
def test_unknown_and_mistyped_fields_are_named(path, value):
    message = refusal(recipe_from_dict, values_with(path, value), "here.json")
    assert message.startswith("recipe here.json: ") and path in message


def test_several_mistakes_are_named_at_once():
    values = values_with("training.steps", "many")
    values["model"]["hiden_size"] = values["model"].pop("hidden_size")
    message = refusal(recipe_from_dict, values, "here.json")
    assert "training.steps" in message and "model.hiden_size" in message


def test_a_recipe_needs_a_name_and_an_object():
    values = values_with("name", "x")
    del values["name"]
    assert "name" in refusal(recipe_from_dict, values, "here.json")
    assert "here.json" in refusal(recipe_from_dict, [1, 2], "here.json")


def test_files_that_cannot_be_read(tmp_path):
    assert "recipe not found" in refusal(find_recipe, str(tmp_path / "none.json"))
    assert "recipe not found" in refusal(find_recipe, str(tmp_path))
    (tmp_path / "recipe.json").write_text("{")
    assert "is not valid JSON" in refusal(find_recipe, str(tmp_path))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("training.steps", -5, "training.steps is -5; it must be at least 1"),
        ("training.steps", 0, "training.steps is 0; it must be at least 1"),
        ("training.batch_rows", 0, "training.batch-rows is 0"),
        ("training.micro_rows", 0, "training.micro-rows is 0"),
        ("training.micro_rows", 5, "training.batch-rows 16 is not a multiple of training.micro-rows 5"),
        ("training.schedule.warmup_steps", -1, "training.schedule.warmup-steps is -1"),
        ("training.schedule.warmdown_ratio", 1.5, "it must be at most 1"),
        ("data.val_fraction", -0.1, "data.val-fraction is -0.1"),
        ("data.case_aug_prob", float("nan"), "data.case-aug-prob is nan"),
        ("release.every", 0, "release.every is 0"),
        ("release.repo_id", "tiny", "release.repo-id 'tiny' must read org/name"),
        ("model.vocab_size", 100, "model.vocab-size is 100; it must be at least 266"),
    ],
)
def test_values_that_no_run_can_have(path, value, expected):
    message = refusal(check, changed(RECIPES["tiny"], path, value))
    assert message.startswith("recipe tiny: ") and expected in message


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model.poe_stage_layers", (3, 2, 2), "must be positive and sum to num_hidden_layers = 6"),
        ("model.num_key_value_heads", 2, "is not a multiple of num_key_value_heads 2"),
        ("model.window_pattern", "SX", "may hold only S (short) and L (long)"),
        ("model.head_dim", 63, "head_dim 63 must be even"),
        ("model.poe_mode", "none", "set --model.poe-stage-layers 6"),
        ("model.max_position_embeddings", 63, "use at least as many"),
        ("model.vocab_size", 65_537, "at most 65536"),
        ("training.steps", 9, "training.schedule.warmup-steps 10 is longer than the run of 9 steps"),
        ("release.repo_id", "../..", "must read org/name"),
        ("release.repo_id", "org/na me", "must read org/name"),
    ],
)
def test_what_would_stop_a_run_later_is_refused_before_anything_is_written(tmp_path, path, value, expected):
    recipe = changed(RECIPES["tiny"], path, value)
    message = refusal(check_run, recipe)
    assert message.startswith("recipe tiny: ") and expected in message
    assert refusal(pipeline.prepare, recipe, tmp_path / "run", lambda line: None) == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_may_start_from_every_named_recipe(name):
    assert check_run(RECIPES[name]) is RECIPES[name]
