"""A published table becomes partial rows: nothing is filled in, and a change counts by what its sample size implies."""

import json
import random
import re

import pytest

from cognica_poe.errors import UserError
from cognica_poe.release.checkpoints import as_csv, line_of
from cognica_poe.release.published import (
    Sizes,
    import_table,
    is_published,
    parse_table,
    read_published,
    readings,
    share_interval,
    steps_of,
)
from cognica_poe.release.report.html import write_report
from tests.release.records import make_record, make_run

TABLE = """step,train_log_val_bpb,slice_full_bpb,wand_0_1,wand_1_2,acc_s0,acc_s1,acc_full,spec_acceptance,spec_speedup
2000,0.9,,3.7,1.6,,,,,
4000,0.8,0.75,3.8,,0.40,0.42,0.41,0.95,1.5
6000,,0.70,,1.5,0.40,0.43,0.42,0.96,
8000,0.7,0.65,3.6,1.4,0.50,0.52,0.51,0.70,1.2
"""


def test_what_a_table_does_not_hold_is_missing():
    rows = parse_table(TABLE, "t.csv")
    assert [row["step"] for row in rows] == [2000, 4000, 6000, 8000]
    assert rows[0]["bpb"] is None and rows[0]["acceptance"] is None and rows[0]["wand_bounds"] == [3.7, 1.6]
    assert rows[1]["wand_bounds"] == [3.8] and rows[2]["wand_bounds"] == [None, 1.5]
    assert rows[1]["accuracy_stage"] == [0.40, 0.42] and rows[2]["validation_bpb"] is None
    assert rows[3]["routed"] is None and rows[2]["speed_up"] is None


def test_rows_in_any_order_and_our_own_table_are_read():
    lines = TABLE.splitlines()
    mixed = "\n".join([lines[0], lines[3], lines[1], lines[4], lines[2]])
    assert parse_table(mixed, "t") == parse_table(TABLE, "t")
    own = [line_of(make_record(step, stages=3), {"progress": {"epoch": 1}}, "ab" * 32) for step in (0, 100)]
    rows = parse_table(as_csv(own).decode(), "own")
    assert rows[1]["bpb"] == own[1]["bpb"] and rows[1]["bpb_stage"] == own[1]["bpb_stage"]
    assert rows[1]["wand_bounds"] == own[1]["wand_bounds"] and rows[1]["routed"] == own[1]["routed"]


@pytest.mark.parametrize(
    "change, said",
    [
        (("step,", "stepp,"), "unknown column 'stepp'"),
        (("spec_acceptance", "spec_acceptence"), "unknown column 'spec_acceptence'; columns are step,"),
        (("acc_s1", "acc_s0"), "names a column twice"),
        (("4000,", "2000,"), "line 3: step 2000 is there twice"),
        (("0.95", "95"), "line 3: spec_acceptance is '95': it must be a share from 0 to 1, or empty"),
        (("0.75", "nan"), "line 3: slice_full_bpb is 'nan'"),
        (("0.75", "-1"), "must be a number, 0 or more"),
        (("6000,", "6000.5,"), "must be a whole number"),
        (("6000,", ","), "line 4 has no step"),
        ((",1.5\n", "\n"), "line 3 has 9 cells, the first line 10"),
        (("2000,0.9", '"2000,0.9'), "is no CSV"),
    ],
)
def test_what_a_table_may_not_hold_is_named(change, said):
    assert change[0] in TABLE
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        parse_table(TABLE.replace(*change, 1), "t.csv")
    assert "\n" not in str(caught.value)
    for text in ("", "step\n", "a,b\n1,2\n"):
        with pytest.raises(UserError):
            parse_table(text, "t.csv")


def test_a_change_is_noise_where_its_sample_says_so(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE)
    found = import_table(tmp_path / "t.csv", tmp_path / "out", "theirs", Sizes(drafts=420))
    assert is_published(tmp_path / "out") and read_published(tmp_path / "out") == found
    first, second = steps_of(found, "acceptance")
    assert (first.since, first.step, first.noise, first.survives) == (4000, 6000, True, False)
    assert (second.since, second.step, second.noise, second.survives) == (6000, 8000, False, True)
    error = (0.95 * 0.05 / 420 + 0.96 * 0.04 / 420) ** 0.5
    assert first.high - first.value == pytest.approx(1.959964 * error)
    assert steps_of(found, "accuracy") == [], "no sample size, no interval"
    (line,) = readings(found)
    assert line.startswith("1 of 2 changes of acceptance") and "1 of 2 hold Holm's correction" in line
    with pytest.raises(UserError, match="is not a trajectory folder"):
        (tmp_path / "foreign").mkdir()
        (tmp_path / "foreign" / "x").write_text("x")
        import_table(tmp_path / "t.csv", tmp_path / "foreign", "n", Sizes())
    file = tmp_path / "out" / "trajectory.json"
    file.write_text(file.read_text().replace("0.95", "0.99"))
    with pytest.raises(UserError, match=r"trajectory\.json is corrupt"):
        read_published(tmp_path / "out")


def test_equal_shares_are_noise_nineteen_times_in_twenty():
    generator, noise, tried = random.Random(1), 0, 400
    rows = "step,acceptance\n" + "".join(
        f"{step},{sum(generator.random() < 0.9 for _ in range(420)) / 420}\n" for step in range(tried + 1)
    )
    kept = parse_table(rows, "t")
    from cognica_poe.release.published import Published

    steps = steps_of(Published("n", "t", "0" * 64, Sizes(drafts=420), kept), "acceptance")
    noise = sum(step.noise for step in steps)
    assert 0.92 * tried <= noise <= 0.98 * tried and sum(step.survives for step in steps) <= 1


def test_an_interval_of_a_share_holds_the_share():
    for share in (0.0, 0.1, 0.5, 0.98, 1.0):
        low, high = share_interval(share, 420)
        assert 0.0 <= low <= share <= high <= 1.0 and high - low < 0.1


def test_a_report_draws_it_beside_a_run(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE)
    import_table(tmp_path / "t.csv", tmp_path / "theirs", "<theirs>", Sizes(drafts=420))
    run = make_run(tmp_path / "run")
    text = write_report([run, tmp_path / "theirs"], tmp_path / "page.html").read_text()
    assert "Beside published trajectories" in text and "Bits per byte by share of training" in text
    assert "1 of 2 changes of acceptance" in text and "<theirs>" not in text and "&lt;theirs&gt;" in text
    assert text == write_report([run, tmp_path / "theirs"], tmp_path / "again.html").read_text()
    alone = write_report([tmp_path / "theirs"], tmp_path / "alone.html").read_text()
    assert "1 published, 4 checkpoints" in alone and "Published checkpoints" in alone
    assert json.loads((tmp_path / "theirs" / "trajectory.json").read_text())["rows"][0]["bpb"] is None
