"""No sentence of card or report contradicts its record: what is said follows from sign and interval."""

import copy
import html
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cognica_poe.analysis.record import AnalysisRecord
from cognica_poe.release.card.markdown import render_card
from cognica_poe.release.card.readings import comparisons, gap_lines, routing_reading, wand_reading
from cognica_poe.release.report.html import render_report
from cognica_poe.release.report.run_folder import RunFolder
from tests.release.records import RELEASE, make_record

ORDER = re.compile(
    r"(?P<role>deepest stage|best stage|best prefix) \((?P<other>stage \d+ alone|the first \d+ stages)\): "
    r"(?:(?P<none>no difference seen), \S+ \[\S+ \S+\]"
    r"|(?P<winner>the full pool|stage \d+ alone|the first \d+ stages) (?:is|are) better, "
    r"by (?P<by>[\d.]+) \[(?P<low>[\d.]+), (?P<high>[\d.]+)\])"
)
FIXED = {"Lower is better.", "lower is better."}
"""Definitions, which order no two figures of a record."""


def record_with(values: list[tuple[float, float, float]], prefixes: list[tuple[float, float, float]]) -> dict:
    """A record whose pool differs by ``(value, below, above)`` from each stage and each prefix but the last."""
    record = make_record(300, stages=len(values))
    full = record["bpb"]["full"]
    record["bpb"]["stage"] = [full - value for value, _, _ in values]
    record["bpb"]["prefix"] = [*(full - value for value, _, _ in prefixes), full]
    record["gaps"] = {
        kind: [{"value": value, "low": value - below, "high": value + above} for value, below, above in rows]
        for kind, rows in (("stage", values), ("prefix", prefixes))
    }
    return record


def report_of(record: dict) -> str:
    """The report's text, tags left out."""
    run = RunFolder(Path("run"), "run", {}, [record], [], [], {})
    return html.unescape(re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]+>", " ", render_report([run]), flags=re.S))


@pytest.mark.parametrize(
    "value, below, above, said",
    [
        (0.0014, 0.0007, 0.0005, "the first 2 stages are better, by 0.0014 [0.0007, 0.0019]"),
        (-0.0014, 0.0005, 0.0007, "the full pool is better, by 0.0014 [0.0007, 0.0019]"),
        (-0.0002, 0.0019, 0.0013, "no difference seen, -0.0002 [-0.0021, +0.0011]"),
        (0.000465, 0.00005, 0.00005, "the first 2 stages are better, by 0.000465 [0.000415, 0.000515]"),
        (0.0, 0.0, 0.0, "no difference seen, +0.000000 [+0.000000, +0.000000]"),
    ],
)
def test_the_best_prefix_is_read_by_sign_and_interval(value, below, above, said):
    worse = (-0.1, 0.01, 0.01)
    record = record_with([worse, worse, worse], [worse, (value, below, above)])
    assert said in gap_lines(record)[2]
    for text in (render_card([record], RELEASE), report_of(record)):
        assert f"best prefix (the first 2 stages): {said}" in text


def test_best_is_by_figures_and_the_deepest_stage_is_named_apart():
    record = record_with(
        [(0.012, 0.004, 0.004), (-0.01, 0.001, 0.001), (-0.0098, 0.001, 0.001)], [(0.012, 0.004, 0.004)] * 2
    )
    roles = {item.role: item for item in comparisons(record)}
    assert roles["best stage"].other == "stage 0 alone" and roles["deepest stage"].other == "stage 2 alone"
    assert roles["best stage"].reading == "stage 0 alone is better, by 0.0120 [0.0080, 0.0160]"
    assert roles["deepest stage"].reading == "the full pool is better, by 0.0098 [0.0088, 0.0108]"
    assert roles["best prefix"].other == "stage 0 alone", "of equals the one of fewer layers"


small = st.floats(-0.05, 0.05)
width = st.one_of(st.just(0.0), st.floats(0.0, 0.06))


@st.composite
def records(draw) -> dict:
    """Records with any gaps of 2 to 5 stages."""
    triple, stages = st.tuples(small, width, width), draw(st.integers(2, 5))
    rows = draw(st.lists(triple, min_size=stages, max_size=stages))
    rest = draw(st.lists(triple, min_size=stages - 2, max_size=stages - 2))
    record = record_with(rows, [rows[0], *rest])
    AnalysisRecord.model_validate(copy.deepcopy(record))
    return record


@settings(max_examples=100, deadline=None, phases=[Phase.generate])
@given(records())
def test_no_order_in_a_card_contradicts_its_record(record):
    check_orders(render_card([record], RELEASE), record)


@settings(max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(records())
def test_no_order_in_a_report_contradicts_its_record(record):
    check_orders(report_of(record), record)


def check_orders(text: str, record: dict) -> None:
    """Every statement of order in ``text`` is one that the record gives."""
    found = list(ORDER.finditer(text))
    assert len(found) >= 3 and {match["role"] for match in found} == {"deepest stage", "best stage", "best prefix"}
    for match in found:
        kind, index = ("stage", int(re.findall(r"\d+", match["other"])[0]))
        if match["other"].startswith("the first"):
            kind, index = "prefix", index - 1
        gap, own = record["gaps"][kind][index], record["bpb"][kind]
        if match["role"] == "deepest stage":
            assert kind == "stage" and index == len(own) - 1
        if match["role"] == "best stage":
            assert kind == "stage" and own[index] == min(own)
        if match["role"] == "best prefix":
            prefixes = record["bpb"]["prefix"][:-1]
            assert record["bpb"][kind][index] == min(prefixes) == prefixes[index]
        if match["none"]:
            assert gap["low"] <= 0 <= gap["high"]
        else:
            assert match["winner"] == ("the full pool" if gap["high"] < 0 else match["other"])
            assert gap["high"] < 0 or gap["low"] > 0
            assert float(match["by"]) == pytest.approx(abs(gap["value"]), abs=6e-5)
            assert float(match["low"]) == pytest.approx(min(abs(gap["low"]), abs(gap["high"])), abs=6e-5)
    rest = ORDER.sub("", text)
    for said in FIXED:
        rest = rest.replace(said, "")
    words = re.findall(r".{0,40}\b(?:better|worse|beats?|helps?|pays?|outperforms?|superior|wins?)\b.{0,40}", rest)
    assert not words, "order stated in words that no test reads"


def test_wand_is_said_to_save_nothing_where_nothing_leaves_and_never_to_pay_untimed():
    record = make_record(300)
    assert "Whether that saves time is not part of this record" in wand_reading(record)
    record["wand"]["exit_fraction"] = [0.0, 0.0, 0.0, 1.0]
    assert wand_reading(record) == "No token leaves early at these bounds: WAND saves nothing here."
    assert wand_reading(make_record(300, stages=1)) == ""


@pytest.mark.parametrize(
    "ratio, low, high, said",
    [
        (0.8, 0.59, 0.95, "It does not pay here: 0.80x [0.59, 0.95] of plain decoding's speed."),
        (1.12, 1.05, 1.2, "It pays here: 1.12x [1.05, 1.20]"),
        (0.98, 0.9, 1.06, "No gain is seen here: 0.98x [0.90, 1.06]"),
        (1.02, 0.99, 1.06, "No gain is seen here: 1.02x [0.99, 1.06]"),
    ],
)
def test_whether_wand_pays_follows_from_its_timed_interval(ratio, low, high, said):
    record = make_record(300)
    record["speeds"] = [speed("wand", ratio, low, high), speed("stage 0", 1.5, 1.4, 1.6)]
    AnalysisRecord.model_validate(copy.deepcopy(record))
    for text in (render_card([record], RELEASE), report_of(record)):
        assert said in text and "Measured speed" in text and "1.50x [1.40, 1.60]" in text
        others = {"It does not pay here", "It pays here", "No gain is seen here"} - {said.partition(":")[0]}
        assert not any(word in text for word in others)


def speed(mode: str, ratio: float, low: float, high: float) -> dict:
    """A timed mode."""
    return {"mode": mode, "ratio": ratio, "low": low, "high": high, "prompts": 7, "new_tokens": 60,
            "dtype": "float32", "device": "cpu"}  # fmt: skip


@pytest.mark.parametrize(
    "fraction, said",
    [(1.0, "The cap of 2.0 % never binds"), (0.61, "the cap of 2.0 % binds: 61.00 %"), (0.0, "no position can be")],
)
def test_a_cap_that_never_binds_says_so(fraction, said):
    record = make_record(300)
    record["routing"]["fraction"] = fraction
    assert said in routing_reading(record)
    for text in (render_card([record], RELEASE), report_of(record)):
        assert said in text and ("(cap never binds)" in text) == (fraction == 1.0)
