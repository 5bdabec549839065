"""Tables of a record's cheaper uses: every cell is of the record, projected speed beside measured."""

import copy

from cognica_poe.release.card.markdown import render_card
from cognica_poe.release.card.uses import drafts, leaving, routing_curve, uses
from cognica_poe.release.text import MISSING
from tests.release.records import RELEASE, make_record

CAPS = (0.001, 0.02)


def with_uses(step: int = 100, speeds: bool = True) -> dict:
    record = make_record(step, stages=3)
    record["exit_rules"] = [
        {"stated": None, "margins": [3.5, 1.25], "exit_fraction": [0.03, 0.2, 0.77], "agreement": 1.0, "low": 0.9999},
        {"stated": 0.99, "margins": [0.4, 0.16], "exit_fraction": [0.55, 0.27, 0.18], "agreement": 0.992, "low": 0.991},
        {"stated": 0.999, "margins": None, "exit_fraction": None, "agreement": None, "low": None},
    ]
    lengths = [
        {"k_draft": k, "proposed": 10_000 * k, "accepted": 9_000 * k, "rounds": 10_000, "acceptance": 0.9, "low": 0.88,
         "high": 0.92, "tokens_per_round": 1.0 + 0.9 * k}
        for k in (1, 2)
    ]  # fmt: skip
    record["drafts"] = {"prompts": 345, "documents": 15, "context": 32, "new_tokens": 60, "draft_stage": 0,
                        "lengths": lengths, "probes": {**record["speculative"], "new_tokens": 60}}  # fmt: skip
    record["routing"]["curve"] = [
        {"cap": cap, "counted": counted, "of": of, "fraction": 0.5 + cap, "low": 0.4, "high": 0.6, "threshold": 0.5,
         "tested_fraction": 0.49, "tested_rate": cap / 2}
        for counted in ("lost", "net") for of in ("routed", "all") for cap in CAPS
    ]  # fmt: skip
    if speeds:
        record["speeds"] = [
            {"mode": mode, "ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1, "prompts": 7, "new_tokens": 60,
             "dtype": "float32", "device": "cpu"}
            for mode, ratio in {"wand": 0.8, "wand 0.99": 1.3, "wand routed 0.02": 1.5, "stage 0": 2.0}.items()
        ]  # fmt: skip
    return record


def test_rules_of_early_exit():
    section = leaving(with_uses())
    assert section.header == [
        "rule",
        "margin 0",
        "margin 1",
        "exit 0",
        "exit 1",
        "exit 2",
        "agreement",
        "at least",
        "speed",
    ]
    names = [row[0] for row in section.rows]
    assert names == ["WAND bounds", "direct p99 bounds", "99 % agreement", "99.9 % agreement"]
    record = with_uses()
    assert section.rows[0][1] == f"{sum(record['wand_bounds']):.3f}" and section.rows[0][-1] == "0.80x [0.70, 0.90]"
    assert section.rows[2][1:] == [
        "0.400",
        "0.160",
        "55.0 %",
        "27.0 %",
        "18.0 %",
        "99.20 %",
        "99.10 %",
        "1.30x [1.20, 1.40]",
    ]
    assert set(section.rows[3][1:]) == {MISSING}
    assert leaving(with_uses(speeds=False)).rows[2][-1] == section.rows[3][-1]


def test_drafts_by_length_and_the_protocol_of_the_original():
    rows = drafts(with_uses()).rows
    assert rows[1] == ["2", "90.00 %", "[0.880, 0.920]", "18,000", "20,000", "2.80", "345", "60"]
    assert rows[-1][0] == "4, probe prompts" and rows[-1][-2:] == ["7", "60"]


def test_projected_speed_stands_beside_measured():
    section = routing_curve(with_uses())
    assert section.header == ["cap", "lost of routed", "lost of all", "net loss of routed", "net loss of all",
                              "tested loss", "at 0.510", "at 0.51", "at 0.500", "speed"]  # fmt: skip
    row = section.rows[1]
    assert row[0] == "2.0 %" and row[1] == "52.0 % [40.0, 60.0]" and row[5] == "1.00 %"
    assert row[6:9] == [
        f"{1 / (1 - 0.49 * 0.52):.2f}x",
        f"{1 / (1 - 0.49 * 0.52):.2f}x",
        f"{1 / (1 - 0.5 * 0.52):.2f}x",
    ]
    assert row[9] == "1.50x [1.40, 1.60]" and section.rows[0][9] != row[9]
    assert "at 0.500" not in routing_curve(with_uses(speeds=False)).header


def test_a_record_without_them_has_no_such_section():
    assert uses(make_record(100)) == []
    plain = render_card([make_record(100, stages=3)], RELEASE)
    card = render_card([with_uses()], RELEASE)
    for title in ("## Early exit by rule", "## Acceptance by draft length", "## Routing by cap"):
        assert title in card and title not in plain
    for section in uses(with_uses()):
        assert len(section.text) < 1000  # a report shows as much
    one = copy.deepcopy(with_uses())
    for length in one["drafts"]["lengths"]:
        length["low"] = length["high"] = None
    assert drafts(one).rows[0][2] not in ("", "[0.880, 0.920]")
