"""What the journals of a run say: validations, minima, marks, the share of time."""

import pytest

from cognica_poe.release import history

SLICE = "ab" * 32


def line(step, full=None, **more):
    held = {} if full is None else {"validation": {"full": full, "sha256": SLICE, "seconds": 0.5}}
    return {"step": step, "tokens": 100 * step, "tokens_per_second": 50.0, **held, **more}


def test_lines_of_one_step_are_one_row():
    rows = history.by_step([line(2), line(1, loss=5.0), {"step": 2, "validation": {"full": 1.5}}, line(1, loss=3.0)])
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == 3.0 and rows[1]["validation"] == {"full": 1.5} and rows[1]["tokens"] == 200


def test_minima_are_below_all_before_them_on_the_same_slice():
    found = history.validations([line(1, 2.0), line(2, 1.5), line(3, 1.7), line(4, float("nan")), line(5, 1.4)])
    assert history.minima(found) == [(1, 2.0), (2, 1.5), (5, 1.4)]
    found[-1]["sha256"] = "cd" * 32  # another slice begins anew
    assert history.minima([*found, {"step": 6, "full": 1.9, "sha256": "cd" * 32}]) == [(1, 2.0), (2, 1.5), (5, 1.4)]


def test_the_share_of_time_counts_both():
    rows = [line(1), line(2, 2.0), line(3), line(4, 2.0)]
    assert history.share_of_time(rows) == pytest.approx(1.0 / (1.0 + 8.0))
    assert history.share_of_time([]) is None


def test_progress_says_none_for_what_is_not_known():
    told = history.progress_at([line(50, 1.5, epoch=1, shard=3, lr_scale=0.5)], 50, 200)
    assert told == {"of_training": 0.25, "epoch": 1, "shard": 3, "lr_scale": 0.5, "validation_bpb": 1.5}
    assert history.progress_at([], 0, 200)["epoch"] is None


def test_marks_are_in_order_and_in_words():
    metrics = [line(1, epoch=0), line(2, epoch=0), line(3, epoch=1)]
    events = [
        {"event": "start", "step": 0},
        {"event": "roll back", "step": 9, "to": 6},
        {"event": "resume", "step": 4, "restarts": 2},
        {"event": "recipe changed", "step": 4, "changes": {"training.steps": {}}},
    ]
    found = [(mark.step, mark.text) for mark in history.marks(metrics, events)]
    assert found == [
        (2, "epoch 1 begins"),
        (4, "recipe changed: training.steps"),
        (4, "restart 2"),
        (9, "rolled back to step 6"),
    ]
