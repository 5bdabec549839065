"""In flat mode the peak is that of the largest stage, not of the trunk."""

import pytest
import torch

from benchmarks.memory import measure, peak_bytes

SHAPE = {"width": 64, "vocab": 128, "length": 64, "rows": 2}


def test_the_measurement_sees_what_is_alive_at_once():
    def run():
        kept = torch.ones(1000)
        for _ in range(5):
            torch.ones(500)  # released at once: counts once
        return kept

    assert 6000 <= peak_bytes(run) < 6500


def test_the_measurement_sees_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)

    def run():
        y = x
        for _ in range(10):
            y = y.sin()  # keeps its input
        y.sum().backward()

    assert 10 * 4000 <= peak_bytes(run) < 16 * 4000


@pytest.fixture(scope="module")
def plain() -> int:
    return measure("none", **SHAPE, layers=[16, 6, 5, 5])


def test_local_losses_free_each_stage_before_the_next(plain):
    """Layers (16, 6, 5, 5): the largest stage is half of the trunk; a tenth is left for heads and scratch space."""
    assert measure("flat", **SHAPE, layers=[16, 6, 5, 5]) <= 0.6 * plain


def test_equal_stages_need_a_quarter(plain):
    assert measure("flat", **SHAPE, layers=[8, 8, 8, 8]) <= 0.35 * plain


def test_deep_supervision_frees_nothing(plain):
    assert measure("hier", **SHAPE, layers=[16, 6, 5, 5]) >= 0.95 * plain
