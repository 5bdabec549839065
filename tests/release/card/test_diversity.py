"""Stage diversity: geometry over steps, heads off and scaled, facts recalled."""

import pytest

from cognica_poe.release.card.diversity import clusters, diversity
from cognica_poe.release.card.markdown import render_card
from cognica_poe.release.trajectory import Trajectory
from tests.release.records import HOSTILE, RELEASE, make_record

ALONE = [[1.0, -0.97, -0.98], [-0.97, 1.0, 0.95], [-0.98, 0.95, 1.0]]


def with_heads(step: int, perturbed: bool) -> dict:
    record = make_record(step, stages=3)
    gauge = {"norm": [1.0, 2.0, 3.0], "alignment": ALONE, "unique_share": [1.0, 0.228, 0.08]}
    record["heads"] = {**gauge, "folded": gauge, "centred": {**gauge, "alignment": [[None] * 3] * 3},
                       "top_tokens": [["a|b", r"\xe2\x82", HOSTILE[:20]], [" the"], []]}  # fmt: skip
    if perturbed:
        change = {"value": 0.05, "low": 0.04, "high": 0.06, "bpb": 2.0}
        variants = [(k, 0.0) for k in range(3)] + [(None, beta) for beta in (0.0, 1.0, 2.0)]
        record["heads"] |= {"tokens": 16_384, "units": 15, "perturbations": [
            {"gauge": g, "stage": stage, "beta": beta, **change}
            for g in ("stored", "centred") for stage, beta in variants
        ], "recall": [
            {"prompt": "The chemical symbol of gold is", "answer": "Au", "gauge": g, "beta": beta,
             "probability": 0.01 * beta, "rank": 12} for g in ("stored", "centred") for beta in (0.0, 1.0, 2.0)
        ]}  # fmt: skip
    return record


@pytest.mark.parametrize(
    ("alignment", "shown"),
    [
        (ALONE, "{0} {1, 2}"),
        ([[1.0, 0.977, -0.98], [0.977, 1.0, -0.97], [-0.98, -0.97, 1.0]], "{0, 1} {2}"),
        ([[1.0, 0.91, 0.2], [0.91, 1.0, 0.92], [0.2, 0.92, 1.0]], "{0, 1, 2}"),
        ([[1.0, 0.0], [0.0, 1.0]], "{0} {1}"),
    ],
)
def test_clusters_are_named(alignment, shown):
    assert clusters(alignment) == shown


def test_geometry_over_steps_and_perturbations_at_the_last_step():
    trajectory = Trajectory.of([with_heads(50, False), with_heads(100, True)], {})
    found = {section.title: section for section in diversity(trajectory)}
    table = found["Stage diversity"]
    assert [row[0] for row in table.rows] == ["50", "100"] and table.rows[1][1:5] == [
        "22.8 %",
        "8.0 %",
        "30.8 %",
        "{0} {1, 2}",
    ]
    assert found["One stage head off"].rows[1] == [
        "stage 1",
        "+0.0500 [+0.0400, +0.0600]",
        "+0.0500 [+0.0400, +0.0600]",
    ]
    assert [row[0] for row in found["Stage heads times beta"].rows] == ["0", "1", "2"]
    assert found["Facts recalled, by beta"].rows[2] == ["2", "2.00e-02 (rank 12)"]
    only_geometry = diversity(Trajectory.of([with_heads(50, False)], {}))
    assert [section.title for section in only_geometry] == ["Stage diversity", "Top tokens of the stage heads"]
    assert diversity(Trajectory.of([make_record(50)], {})) == []


def test_tokens_of_a_model_are_no_markup():
    card = render_card([with_heads(100, True)], RELEASE)
    part = card.partition("## Top tokens")[2].partition("\n## ")[0]
    assert r"a\|b" in part and "`code`" not in part and r"\\xe2\\x82" in part
