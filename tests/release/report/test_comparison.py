"""Several runs: each has a name of its own, differences are paired, a pool is measured against its controls."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from cognica_poe.analysis.bits_per_byte import DocumentSums
from cognica_poe.analysis.gap import compute_factor, gap_to_control
from cognica_poe.analysis.sums import Sums
from cognica_poe.errors import UserError
from cognica_poe.recipe.named import RECIPES
from cognica_poe.release.card.gap import as_dict, gap_reading, gap_section
from cognica_poe.release.report.comparison import comparison, differences, gap_among, labels
from cognica_poe.release.report.html import render_report
from cognica_poe.release.report.run_folder import RunFolder
from tests.release.records import make_record

SIZES = np.random.default_rng(0).integers(300, 500, 60)


def side(level, path="pool", layers=(4, 2, 2), noise=0.01, seed=1, slice_of="ab", **model):
    """A record at step 300 whose trained path takes about ``level`` bits per byte, and its sums."""
    own = np.random.default_rng(5).normal(1.0, 0.2, len(SIZES))
    nats = (level * own + np.random.default_rng(seed).normal(0.0, noise, len(SIZES))) * SIZES * np.log(2)
    record = make_record(300, path=path, stages=len(layers))
    record["model"] |= {"stage_layers": list(layers), **model}
    record["validation"]["sha256"] = slice_of * 32
    record["bpb"]["full"] = float(nats.sum() / SIZES.sum() / np.log(2))
    names = ["full", "plain", *(f"{kind}{k}" for kind in ("stage", "prefix") for k in range(len(layers)))]
    return record, Sums(DocumentSums(SIZES, SIZES, dict.fromkeys(names, nats), dict.fromkeys(names, 0.3 * SIZES)))


def run_of(pair, name="tiny", path="a", **changes):
    record, sums = pair
    recipe = dataclasses.asdict(RECIPES["tiny"]) | {"name": name}
    for key, value in changes.items():
        part, _, field = key.partition("__")
        recipe[part] = {**recipe[part], field: value}
    return RunFolder(Path(path), name, recipe, [record], [], [], {}, {record["step"]: sums})


def test_every_run_has_a_name_of_its_own():
    runs = [run_of(side(2.0)), run_of(side(2.0), model__poe_stage_layers=(2, 2, 2)), run_of(side(2.0), name="other")]
    assert labels(runs) == ["tiny (stage layers 3, 2, 1)", "tiny (stage layers 2, 2, 2)", "other"]
    twins = [run_of(side(2.0), path="x/a"), run_of(side(2.0), path="y/a"), run_of(side(2.0), path="b")]
    assert labels(twins) == ["tiny, a, 1", "tiny, a, 2", "tiny, b"]
    published = [run_of(side(2.0), path="a"), run_of(side(2.0), path="b", release__every=7)]
    assert labels(published) == ["tiny, a", "tiny, b"] and differences(published)[0][0] == "release.every"
    for number in range(2, 5):
        for chosen in itertools.combinations([*runs, *twins], number):
            assert len(set(labels(chosen))) == number


def test_the_difference_of_two_runs_is_paired_and_labelled():
    apart = [run_of(side(2.0)), run_of(side(2.05, seed=2), name="b")]
    text = re.sub(r"<[^>]+>", " ", comparison(apart, labels(apart)))
    found = re.search(r"b\s+tiny\s+bits per byte\s+\+(0\.0\d+)\s+\[\+(0\.0\d+), \+(0\.0\d+)\]\s+signal", text)
    assert found and float(found[1]) == pytest.approx(0.05, abs=0.005)
    assert float(found[2]) > 0.03, "unpaired the interval would be ten times as wide"
    alike = [run_of(side(2.0)), run_of(side(2.0, seed=2), name="b")]
    text = re.sub(r"<[^>]+>", " ", comparison(alike, labels(alike)))
    assert re.search(r"bits per byte\s+[+-]0\.00\d+\s+\[[^]]*\]\s+noise", text)
    other = [run_of(side(2.0)), run_of(side(2.0, slice_of="cd"), name="b")]
    assert "not measured on one slice" in comparison(other, labels(other))


@pytest.mark.parametrize(
    "pool, word", [(2.1, "Behind control by"), (1.9, "Ahead of control"), (2.0, "Against control: no difference seen")]
)
def test_the_gap_is_said_as_its_interval_has_it(pool, word):
    control = side(2.0, "plain", (8,), seed=3, name="control")
    gap = gap_to_control(side(pool), control, side(2.2, "plain", (4,), seed=4, name="shallow"))
    assert gap_reading(as_dict(gap)).startswith(word)
    assert gap.relative.value == pytest.approx(pool / 2.0 - 1.0, abs=0.003)
    assert gap.relative.low <= gap.relative.value <= gap.relative.high
    for part, share in ((gap.factor.value, gap.relative.value), (gap.factor.high, gap.relative.high)):
        assert part == pytest.approx(compute_factor(share, control[0]["model"]["parameters"], 300 * 16384))
    assert gap.depth_yield.value == pytest.approx((2.2 - pool) / 0.2, abs=0.05)
    section = gap_section({"gap": as_dict(gap)})
    assert "## Gap to backprop" in section and "depth yield R" in section and "from shallow to the control" in section
    assert gap_section({}) == ""
    no_gain = gap_to_control(side(pool), control, side(1.8, "plain", (4,), seed=4))
    assert no_gain.depth_yield is None, "where depth gains nothing there is no R"


@pytest.mark.parametrize(
    "control, said",
    [
        (side(2.0, "plain", (6,)), "has 6 layers, the control run of this pool has 8"),
        (side(2.0), "is no control run"),
        (side(2.0, "plain", (8,), slice_of="cd"), "measured on another slice"),
    ],
)
def test_what_is_no_control_is_refused(control, said):
    with pytest.raises(UserError, match=said):
        gap_to_control(side(2.0), control)
    with pytest.raises(UserError, match="has no stages"):
        gap_to_control(side(2.0, "plain", (8,)), control)


def test_a_report_finds_the_controls_among_its_runs():
    pool, control = run_of(side(2.1)), run_of(side(2.0, "plain", (8,), seed=3, name="c"), name="c")
    shallow = run_of(side(2.2, "plain", (4,), seed=4), name="s")
    assert gap_among(pool, [pool, shallow]) is None and gap_among(control, [pool, control]) is None
    assert gap_among(pool, [pool, control])["depth_yield"] is None
    page = render_report([pool, control, shallow])
    assert "Gap of tiny to backprop" in page and "depth yield R" in page
    wider = run_of(side(2.0, "plain", (8,)), name="w", model__hidden_size=7)
    assert gap_among(pool, [pool, wider]) is None, "a control has the width of its pool"
