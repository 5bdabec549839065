"""Lines survive a kill in the middle of one."""

import json

from cognica_poe.errors import UserError
from cognica_poe.training.journal import Journal, read_records


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
    Journal(path, True).write({"step": 1})
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert read_records(path) == [{"step": 1}] * (2 if cut == len(whole) - 1 else 1)  # all but the line break
        Journal(path, True).write({"step": 2})
        assert steps(path) == [1, 1, 2] if cut == len(whole) - 1 else [1, 2]


def test_every_changed_byte_is_named_or_changes_nothing(tmp_path):
    path, named, harmless = tmp_path / "metrics.jsonl", 0, 0
    journal = Journal(path, True)
    records = [{"step": step, "loss": 1 / step, "why": "nan"} for step in (1, 2, 3)]
    for record in records:
        journal.write(record)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            lines = []
            try:
                assert read_records(path) == records
                harmless += 1
            except UserError as error:
                assert f"{path} line " in str(error) and "is damaged" in str(error)
                Journal(path, True, log=lines.append)
                assert lines[0].startswith(f"{path} line ") and "left out" in lines[0]
                assert all(record in records for record in read_records(path))
                named += 1
    print(f"journal: {8 * len(whole)} bits flipped, {named} named, {harmless} of no effect")


def test_every_line_is_a_json_object_with_a_checksum(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl", True)
    for step in (1, 2):
        journal.write({"step": step, "loss": 0.5})
    parsed = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in parsed] == [(1, 0.5), (2, 0.5)]
    assert all(set(line) == {"step", "loss", "crc32"} for line in parsed)


def test_other_ranks_leave_the_file_alone(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl", False, keep_until=0)
    journal.write({"step": 1})
    journal.drop_after(0)
    assert not (tmp_path / "metrics.jsonl").exists()
