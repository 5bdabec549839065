"""Schedules against the numbers of the card (3B) and at their corners."""

import itertools
import math

import pytest

from cognica_poe.recipe.fields import ScheduleRecipe
from cognica_poe.recipe.named import RECIPES
from cognica_poe.training.optim.schedule import Schedule


@pytest.fixture
def card() -> Schedule:
    training = RECIPES["3b"].training
    return Schedule(training.schedule, training.steps)


def test_learning_rate_of_the_3b_run(card):
    assert card.warmdown_start == 29_373
    assert card.lr_scale(0) == pytest.approx(1 / 1000)
    assert card.lr_scale(499) == pytest.approx(0.5)
    assert card.lr_scale(999) == card.lr_scale(1000) == card.lr_scale(29_373) == 1.0
    assert card.lr_scale(29_374) < 1.0
    assert card.lr_scale(38_000) == pytest.approx(0.850, abs=5e-4)
    assert card.lr_scale(44_000) == pytest.approx(0.745, abs=5e-4)
    assert card.lr_scale(83_922) == pytest.approx(0.05, abs=5e-5)
    assert card.lr_scale(83_922) > card.lr_scale(83_923) == pytest.approx(0.05)


def test_momentum_of_the_3b_run(card):
    assert card.muon_momentum(0) == 0.85
    assert card.muon_momentum(200) == pytest.approx(0.91)
    assert card.muon_momentum(400) == card.muon_momentum(29_373) == pytest.approx(0.97)
    assert card.muon_momentum((29_373 + 83_923) // 2) == pytest.approx(0.935, abs=1e-6)
    assert card.muon_momentum(83_923) == pytest.approx(0.90)


def test_weight_decay_of_the_3b_run(card):
    assert card.weight_decay_scale(0) == 1.0
    assert card.weight_decay_scale(83_923) == pytest.approx(0.0)
    for step in (1000, 20_981, 60_000):
        assert card.weight_decay_scale(step) == pytest.approx(math.cos(math.pi * step / 83_923 / 2) ** 2)


def test_rates_fall_monotonically_in_the_warmdown(card):
    scales = [card.lr_scale(step) for step in range(29_373, 83_924, 50)]
    assert all(a > b for a, b in itertools.pairwise(scales))


def test_without_warmup_and_warmdown_nothing_moves():
    flat = Schedule(ScheduleRecipe(warmup_steps=0, warmdown_ratio=0.0, momentum_warmup_steps=0), 10)
    assert [flat.lr_scale(step) for step in range(11)] == [1.0] * 11
    assert [flat.muon_momentum(step) for step in range(11)] == [pytest.approx(0.97)] * 11


def test_a_run_of_one_step_has_finite_values():
    schedule = Schedule(ScheduleRecipe(), 1)
    values = (schedule.lr_scale(0), schedule.muon_momentum(0), schedule.weight_decay_scale(0))
    assert all(0 < value <= 1 for value in values)
