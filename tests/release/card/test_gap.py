"""The gap to a control run, from run folders: on the card, and refused where there is no such comparison."""

import pytest

from cognica_poe.analysis.record import AnalysisRecord
from cognica_poe.errors import UserError
from cognica_poe.release.card.gap import gap_of_runs
from cognica_poe.release.card.markdown import render_card
from tests.release.records import RELEASE
from tests.release.report.test_comparison import side


def write(folder, pair, step=300):
    record, sums = pair
    full, old = record["bpb"]["full"], dict(record["bpb"])
    paths = {kind: [full] * len(old[kind]) for kind in ("stage", "prefix")}
    record = {**record, "step": step, "bpb": {**old, **paths}}
    zero = {"value": 0.0, "low": -0.1, "high": 0.1}
    record["gaps"] = {"stage": [zero] * len(old["stage"]), "prefix": [zero] * (len(old["prefix"]) - 1)}
    kept = AnalysisRecord.model_validate(record)
    kept._sums = sums
    kept.write(folder / "analysis")
    return folder


@pytest.fixture
def runs(tmp_path):
    pool = write(tmp_path / "pool", side(2.1, name="pool"))
    control = write(tmp_path / "control", side(2.0, "plain", (8,), seed=3, name="control"))
    return pool, control, write(tmp_path / "shallow", side(2.2, "plain", (4,), seed=4, name="shallow"))


def test_the_card_says_the_gap_as_compute_and_what_depth_yields(runs):
    gap = gap_of_runs(*runs)
    assert gap["relative"]["value"] == pytest.approx(0.05, abs=0.005) and gap["factor"]["value"] > 1.0
    assert gap["depth_yield"]["value"] == pytest.approx(0.5, abs=0.05)
    card = render_card([side(2.1)[0]], {**RELEASE, "gap": gap})
    section = card.partition("## Gap to backprop")[2].partition("\n## ")[0]
    assert "Behind control by +" in section and "less compute" in section and "depth yield R" in section
    assert "## Gap to backprop" not in render_card([side(2.1)[0]], RELEASE | {"gap": None})
    assert gap_of_runs(runs[0], runs[1])["depth_yield"] is None


def test_a_step_without_a_record_is_named_and_a_control_may_stand_elsewhere(runs, tmp_path):
    write(runs[0], side(2.3, name="pool"), step=200)
    assert gap_of_runs(runs[0], runs[1], step=200)["steps"] == (200, 300)
    with pytest.raises(UserError, match="has no record of step 250"):
        gap_of_runs(runs[0], runs[1], step=250)
    with pytest.raises(UserError, match="holds no analysis record"):
        gap_of_runs(runs[0], tmp_path / "none")
    with pytest.raises(UserError, match="is no control run"):
        gap_of_runs(runs[0], runs[0])
    (runs[1] / "analysis" / "step-300.documents.npz").unlink()
    with pytest.raises(UserError, match="has no sums beside the record of step 300"):
        gap_of_runs(runs[0], runs[1])
