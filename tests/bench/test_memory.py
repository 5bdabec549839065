"""In flat mode the peak is that of the largest stage, not of the trunk."""

import dataclasses
import json

import pytest
import torch

from cognica_poe.bench.memory import MemoryWorkload, peak_activations, peak_bytes
from cognica_poe.cli.main import dispatch
from cognica_poe.errors import UserError

SMALL = MemoryWorkload(width=64, vocab=128, length=64, rows=2)


def test_the_peak_holds_what_is_alive_at_once():
    def run():
        kept = torch.ones(1000)
        for _ in range(5):
            torch.ones(500)  # released at once: counts once
        return kept

    assert 6000 <= peak_bytes(run) < 6500


def test_the_peak_holds_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)

    def run():
        y = x
        for _ in range(10):
            y = y.sin()  # keeps its input
        y.sum().backward()

    assert 10 * 4000 <= peak_bytes(run) < 16 * 4000


@pytest.fixture(scope="module")
def plain() -> int:
    return peak_activations("none", SMALL)


def test_local_losses_free_each_stage_before_the_next(plain):
    """Layers (16, 6, 5, 5): the largest stage is half of the trunk; a tenth is left for heads and scratch space."""
    assert peak_activations("flat", SMALL) <= 0.6 * plain


def test_equal_stages_need_a_quarter(plain):
    assert peak_activations("flat", dataclasses.replace(SMALL, layers=(8, 8, 8, 8))) <= 0.35 * plain


def test_deep_supervision_frees_nothing(plain):
    assert peak_activations("hier", SMALL) >= 0.95 * plain


def test_the_command_prints_every_objective(capsys):
    options = "--width 32 --vocab 64 --length 16 --rows 1 --layers 2 1"
    dispatch(["bench", "memory", *options.split(), "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["poe_mode"] for row in rows] == ["none", "hier", "flat"]
    assert all(row["peak_activation_bytes"] > 0 for row in rows) and rows[0]["ratio_to_none"] == 1.0
    expected = peak_activations("flat", MemoryWorkload(32, 64, 16, 1, (2, 1)))
    assert rows[2]["peak_activation_bytes"] == expected


def test_mistakes():
    wrong = (("--rows 0", "--rows is 0"), ("--width 40", "multiple of 32"), ("--layers 0", "--layers is 0"))
    for options, says in wrong:
        with pytest.raises(UserError, match=says):
            dispatch(["bench", "memory", *options.split()])
