"""Micro-batches that this machine's GPUs are expected to hold, before a run finds out that they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from cognica_poe.planning.cluster import Cluster, Gpu
from cognica_poe.planning.plan import GIB, Planner
from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.precision import default_device


def fit_micro_rows(recipe: Recipe, world: int, log: Callable[[str], None]) -> Recipe:
    """``recipe``, on CUDA with as many rows in a micro-batch as the plan finds room for, at most its own.

    Gradients of smaller micro-batches add up to those of the same step, within rounding. Ranks by stages are not
    planned: their recipe stays as it is.

    Args:
        recipe: a checked recipe.
        world: number of ranks, each with a GPU like this process's.
        log: receives a line where rows are taken away, or where not even one is expected to fit.

    Raises:
        UserError: the rows of a step cannot be shared by so many ranks.
    """
    training = recipe.training
    if default_device().type != "cuda" or (world > 1 and training.ranks.parallel == "stages"):
        return recipe
    gpu = _this_gpu()
    planner = Planner(recipe, Cluster(gpus=world), gpu)
    rows = planner.choose_micro_rows()
    if rows == training.micro_rows and planner.fits(rows):
        return recipe
    wanted, room = _gib(planner, training.micro_rows), f"of the {planner.usable / GIB:.0f} GiB that may be filled"
    what = f"memory: micro-batches of {training.micro_rows} rows are expected to take {wanted:.0f} GiB {room}"
    if not planner.fits(rows):
        hint = "--training.recompute layers, " if training.recompute == "off" else ""
        still = f"{rows} rows still {_gib(planner, rows):.0f} GiB"
        log(f"{what}, and {still}; {hint}more ranks or a smaller model would help")
    else:
        log(f"{what}; training with {rows} rows at a time ({_gib(planner, rows):.0f} GiB)")
    return dataclasses.replace(recipe, training=dataclasses.replace(training, micro_rows=rows))


def _gib(planner: Planner, rows: int) -> float:
    return sum(figure.value for figure in planner.memory(rows)) / GIB


def _this_gpu() -> Gpu:
    """This process's GPU: its memory, and whether it multiplies bf16 faster; nothing of it is measured."""
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(memory / GIB, bf16_tflops=2.0 if bf16 else 1.0, fp32_tflops=1.0, link_gbyte=1.0)
