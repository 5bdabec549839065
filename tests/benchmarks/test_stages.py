"""Schedules of a line of ranks: what is counted has a closed form, and is what processes send."""

import pytest

from benchmarks.schedules import SCHEDULES, boundary_bytes, replay, schedule_of
from benchmarks.stages import Workload, counted, run_line


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [6, 8, 32])
@pytest.mark.parametrize("forward, backward", [(1.0, 2.0), (1.0, 1.0), (3.0, 4.0)])
def test_equal_stages_idle_by_the_formula(world, micro_batches, forward, backward):
    """Without gradients the first states' way down the line, with them also the last gradient's way back."""
    one, M = forward + backward, micro_batches
    spans = {"flat": (world - 1) * forward, "pipeline": (world - 1) * one, "delayed": (world - 1) * forward}
    for kind in SCHEDULES:
        idle = replay(kind, [forward] * world, [backward] * world, M)
        assert idle == pytest.approx([spans[kind] / (M * one + spans[kind])] * world), kind


def test_the_slowest_rank_sets_the_pace():
    idle = replay("flat", [1.0, 2.0], [2.0, 4.0], 8)
    assert idle == pytest.approx([1 - 24 / 49, 1 - 48 / 49])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_micro_batch_runs_once_each_way(kind):
    for rank in range(4):
        done = [work for step in schedule_of(kind, rank, 4, 6, 3) for work in step]
        assert [w.micro_batch for w in done if w.kind == "F"] == list(range(18))
        late = 2 * (3 - rank) if kind == "delayed" else 0
        assert [w.micro_batch for w in done if w.kind == "B"] == list(range(18 - late))


@pytest.mark.parametrize(
    "kind", ["delayed", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("flat", "pipeline"))]
)
def test_what_is_counted_is_what_is_sent(kind):
    work = Workload(kind, 2, width=64, length=16, rows=1, micro_batches=3, steps=3)
    found = run_line(work)
    assert found["bytes"] == counted(work)["bytes"] == boundary_bytes(kind, 2, 16, 64, 3)
    assert 0.0 < found["waiting"] < 1.0
