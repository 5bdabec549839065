"""Findings, cumulative changes and milestones say what the labelled changes give, and nothing else."""

import itertools
import re

import numpy as np
import pytest

from cognica_poe.analysis.bits_per_byte import DocumentSums
from cognica_poe.analysis.sums import Sums
from cognica_poe.errors import UserError
from cognica_poe.release.card.findings import cumulative, findings, milestones
from cognica_poe.release.card.markdown import render_card
from cognica_poe.release.text import signed
from cognica_poe.release.trajectory import Trajectory
from tests.release.records import RELEASE, make_record


def _trajectory(levels, base=None):
    """Records of 40 documents whose bits per byte are ``levels``, with sums, one per hundred steps."""
    generator = np.random.default_rng(3)
    sizes = generator.integers(200, 400, 40)
    own = generator.normal(1.0, 0.2, 40)
    records, sums = [], {}
    for place, level in enumerate(levels):
        record = make_record(100 * place, path="plain")
        noise = generator.normal(0.0, 0.01, 40)
        nats = (level * own + noise) * sizes * np.log(2)
        right = (0.2 + 0.05 * place) * sizes + generator.normal(0.0, 2.0, 40)
        names = ("full", "plain", "stage0", "prefix0")
        documents = DocumentSums(sizes, sizes, dict.fromkeys(names, nats), dict.fromkeys(names, right))
        sums[record["step"]] = Sums(documents)
        record["bpb"]["full"] = float(nats.sum() / sizes.sum() / np.log(2))
        records.append(record)
    return records, sums, Trajectory.of(records, sums, base=base)


def test_a_signal_is_told_with_its_interval_and_noise_is_only_named():
    _, _, trajectory = _trajectory([2.0, 1.5, 1.5001])
    first, second = findings(trajectory)
    change = trajectory.rows[1].changes.figures["bpb.full"]
    assert f"bits per byte {signed(change.value)} [{signed(change.low)}, {signed(change.high)}]" in first.text
    assert "bits per byte" not in " ".join(second.signals) and "bits per byte" in second.noise
    assert first.text.startswith("Step 100, since 0: ") and "Noise:" not in first.text


def test_no_finding_contradicts_its_label():
    for seed, level in itertools.product(range(3), (1.9, 1.999, 2.1)):
        _, _, trajectory = _trajectory([2.0, level - 0.001 * seed])
        (found,) = findings(trajectory)
        for name, change in trajectory.rows[1].changes.figures.items():
            assert (len(found.signals) + len(found.noise)) == len(trajectory.rows[1].changes.figures)
            if change.signal:
                assert change.low > 0.0 or change.high < 0.0, name
    _, _, still = _trajectory([2.0, 2.0, 2.0])
    assert all(re.search("Noise: .*bits per byte", found.text) for found in findings(still))


def test_cumulative_changes_are_all_since_one_step():
    records, sums, trajectory = _trajectory([2.0, 1.8, 1.7, 1.65])
    rows = cumulative(trajectory).rows
    full = [record["bpb"]["full"] for record in records]
    assert [row[0] for row in rows] == ["100", "200", "300"]
    assert [float(row[1].split()[0]) for row in rows] == pytest.approx(
        [value - full[0] for value in full[1:]], abs=1e-4
    )
    later = cumulative(Trajectory.of(records, sums, base=200))
    assert [row[0] for row in later.rows] == ["300"] and "since step 200" in later.text
    assert float(later.rows[0][1].split()[0]) == pytest.approx(full[3] - full[2], abs=1e-4)
    assert "3 changes of bits per byte and the 3 changes of accuracy" in cumulative(trajectory).note
    with pytest.raises(UserError, match="step 150 has no record: changes can be taken since 0, 100, 200, 300"):
        Trajectory.of(records, sums, base=150)


def test_the_order_of_records_changes_nothing():
    records, sums, trajectory = _trajectory([2.0, 1.8, 1.7, 1.65])
    for order in itertools.permutations(records):
        assert cumulative(Trajectory.of(list(order), sums)) == cumulative(trajectory)
        assert findings(Trajectory.of(list(order), sums)) == findings(trajectory)


def test_milestones_are_passed_first_where_they_say():
    records = [make_record(step) for step in range(0, 2000, 100)]
    found = milestones(records)
    assert found
    for item in found:
        level = float(re.search(r"[\d.]+(?= %|$)", item.text).group())
        below = "below" in item.text
        values = [(r["step"], r["bpb"]["full"] if below else 100 * r["accuracy"]["full"]) for r in records]
        beyond = [step for step, value in values if (value < level if below else value > level)]
        assert beyond[0] == item.step
        if item.sure is not None and below:
            assert item.sure >= item.step
    assert milestones(records[:1]) == []


def test_the_card_has_the_sections_of_a_release():
    records, sums, _ = _trajectory([2.0, 1.8, 1.7])
    settings = {"batch_rows": 4, "optimizer": {"matrix_lr": 0.02}, "objective": {"exit_weights": []}}
    training = {"recipe": "tiny", "steps": 200, "batch_tokens": 4096, "tokens": 819200, "tokens_per_parameter": 21.0,
                "seed": 5, "settings": settings}  # fmt: skip
    held = {"rows": [{"step": 100, "full": 1.9, "stage": [1.9], "plain": 2.0}], "minima": [[100, 1.9]],
            "share_of_time": 0.0123, "documents": 7, "bytes": 900}  # fmt: skip
    groups = {"trunk": 75, "lm_head": 25}
    release = {**RELEASE, "training": training, "parameter_groups": groups, "validation_in_training": held}
    card = render_card(records, release, sums)
    for title in ("Parameters", "Training", "Validation in training", "Cumulative change", "Findings by checkpoint",
                  "Related models", "Licence and citation"):  # fmt: skip
        assert f"\n## {title}\n" in card
    rows = dict(re.findall(r"^\| ([\w. ]+?) +\| `(.+?)` +\|$", card, re.M))
    assert rows["seed"] == "5" and rows["optimizer.matrix_lr"] == "0.02" and rows["batch tokens"] == "4,096"
    assert "objective.exit_weights" not in rows
    assert "New minima of the trained path: s100 = 1.9000." in card and "It took 1.23 % of the training's time." in card
    assert "| 75.00 % |" in card and "See" not in card.partition("## Licence")[2] and "`NOTICE`" in card
    assert "chinchilla" in card.split("---\n")[1] and "`tiny`" not in card.partition("## Related models")[2]
    pool = render_card([make_record(100, stages=3)], RELEASE)
    stages = pool.partition("## Stage layout")[2].partition("##")[0]
    assert len(re.findall(r"^\| \d ", stages, re.M)) == 3 and "asymmetric-stages" not in pool


def test_raw_markdown_reads_well_in_a_terminal():
    card = render_card([make_record(step) for step in (0, 100)], RELEASE)
    prose = card.partition("## Probes")[0]
    assert "&#" not in card and "&nbsp;" not in card
    assert not re.search(r"\\[0-9]", prose), "a number is not escaped"
    for block in re.findall(r"(?:^\|.*\n)+", prose, re.M):
        assert len({len(line) for line in block.splitlines()}) == 1, "columns line up"
