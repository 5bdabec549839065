"""Lines survive a kill in the middle of one."""

import json

from cognica_poe.training.journal import Journal


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_of_repeated_steps_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, True)
    for step in range(1, 6):
        journal.write({"step": step})
    path.write_bytes(path.read_bytes() + b'{"step": 6, "lo')
    Journal(path, True, keep_until=3).write({"step": 4})
    assert steps(path) == [1, 2, 3, 4]
    journal.drop_after(2)
    assert steps(path) == [1, 2]


def test_a_cut_line_does_not_swallow_the_next_one(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    Journal(path, True).write({"step": 2})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']


def test_other_ranks_leave_the_file_alone(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl", False, keep_until=0)
    journal.write({"step": 1})
    journal.drop_after(0)
    assert not (tmp_path / "metrics.jsonl").exists()
