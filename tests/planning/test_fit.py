"""Micro-batches are made to fit this machine's GPUs before a run starts, and said so in one line."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from cognica_poe.planning import fit
from cognica_poe.recipe.named import RECIPES
from tests.runs import with_ranks, with_training

BIG = RECIPES["3b"]


@pytest.fixture
def gpu(monkeypatch):
    """Let this machine have a GPU of some memory, in GiB."""

    def have(memory):
        monkeypatch.setattr(fit, "default_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        facts = SimpleNamespace(total_memory=memory * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)

    return have


def fitted(recipe, world=1):
    lines = []
    return fit.fit_micro_rows(recipe, world, lines.append), lines


def test_a_processor_takes_the_recipe_as_it_is():
    assert fitted(BIG) == (BIG, [])


@pytest.mark.parametrize("memory", [80, 141, 192])
def test_rows_are_lowered_to_what_fits_and_nothing_else_changes(gpu, memory):
    gpu(memory)
    found, lines = fitted(BIG)
    rows = found.training.micro_rows
    print(f"3b on one GPU of {memory} GiB: micro-batches of {rows} rows; {lines}")
    assert BIG.training.batch_rows % rows == 0 and found == with_training(BIG, micro_rows=rows)
    if rows == BIG.training.micro_rows:
        assert not lines
    else:
        assert len(lines) == 1 and "\n" not in lines[0]
        assert "micro-batches of 8 rows are expected to take" in lines[0] and f"training with {rows} rows" in lines[0]
    assert fitted(found) == (found, [])


def test_80_gib_hold_no_micro_batch_of_8_rows_on_one_gpu_but_do_on_12(gpu):
    gpu(80)
    assert fitted(BIG)[0].training.micro_rows < 8
    assert fitted(BIG, world=12) == (BIG, [])


def test_where_not_one_row_fits_the_line_says_what_would_help(gpu):
    gpu(24)
    found, (line,) = fitted(BIG)
    assert found.training.micro_rows == 1
    assert (
        "and 1 rows still" in line and "--training.recompute layers, more ranks or a smaller model would help" in line
    )
    assert "--training.recompute" not in fitted(with_training(BIG, recompute="layers"))[1][0]


def test_ranks_by_stages_are_left_alone(gpu):
    gpu(24)
    recipe = with_ranks(dataclasses.replace(BIG), parallel="stages")
    assert fitted(recipe, world=4) == (recipe, [])
