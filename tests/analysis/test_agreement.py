import numpy as np
import pytest

from cognica_poe.analysis.agreement import calibrated, config_margins, exit_rules, leaving
from cognica_poe.analysis.bits_per_byte import Positions, measure_paths
from tests.analysis.helpers import ByteTokenizer, make_texts
from tests.analysis.test_wand import random_positions, slow_exit
from tests.conftest import make_model


def made_up(generator, documents: int, longest: int = 800) -> Positions:
    """Positions of documents of unequal length and unequal difficulty: wider margins agree more often."""
    lengths = generator.integers(20, longest, size=documents)
    owner = np.repeat(np.arange(documents), lengths)
    n, hardness = len(owner), generator.lognormal(0.0, 0.5, size=documents)[owner]
    margin = generator.exponential(1.0, size=(2, n)).astype(np.float32)
    margin[1] += margin[0]
    direct = generator.lognormal(0.5, 0.5, size=(2, n)).astype(np.float32)
    agrees = generator.random((2, n)) > 0.3 * hardness * np.exp(-2.0 * margin / hardness)
    none = np.zeros(n, dtype=bool)
    return Positions(owner, margin, direct, agrees, direct, none, none)


def agreement(positions: Positions, margins) -> float:
    stages = np.where(positions.margin[0] > margins[0], 0, np.where(positions.margin[1] > margins[1], 1, 2))
    whole = np.concatenate([positions.agrees, np.ones((1, len(stages)), dtype=bool)])
    return float(whole[stages, np.arange(len(stages))].mean())


def test_leaving_follows_the_rule():
    positions, bounds = random_positions(), [1.5, 0.9, 0.4]
    sums = [sum(bounds[k:]) for k in range(3)]
    expected = [slow_exit(column, bounds, 1.0) for column in positions.margin.T]
    np.testing.assert_array_equal(leaving(positions.margin, sums), expected)


def test_a_stated_agreement_holds_on_text_that_nobody_calibrated_on():
    """With 95 % confidence: of 30 calibrations on 40 documents each, as many as 5 may fail by chance (p < 0.01)."""
    fresh = made_up(np.random.default_rng(1000), 2000, longest=400)
    failed, used, leaves_early = {0.9: 0, 0.99: 0}, {0.9: 0, 0.99: 0}, []
    for trial in range(30):
        positions = made_up(np.random.default_rng(trial), 40, longest=400)
        everything = np.ones(len(positions.document), dtype=bool)
        _, *found = calibrated(positions, positions.document, everything, tuple(failed))
        for stated, margins in zip(failed, found, strict=True):
            if margins is not None:
                used[stated] += 1
                failed[stated] += agreement(fresh, margins) < stated
                leaves_early.append((leaving(fresh.margin, margins) < 2).mean())
    assert min(used.values()) >= 25 and np.mean(leaves_early) > 0.3
    assert max(failed.values()) <= 5, failed


def test_rules_of_a_model_hold_on_its_other_documents():
    model, texts = make_model(max_position_embeddings=24), make_texts(60, longest=200)
    positions = measure_paths(model, ByteTokenizer(), texts).positions
    rules = exit_rules(positions, positions.document, agreements=(0.5, 0.8))
    assert [rule.stated for rule in rules] == [None, 0.5, 0.8]
    for rule in rules:
        assert rule.low <= rule.agreement and sum(rule.exit_fraction) == pytest.approx(1.0)
        assert rule.stated is None or rule.agreement >= rule.stated
    ranks = np.unique(positions.document, return_inverse=True)[1]
    for place, rule in enumerate(rules):  # each fifth by the margins of the others
        right = 0
        for fold in range(5):
            mine = ranks % 5 == fold
            theirs = calibrated(positions, positions.document, ~mine, (0.5, 0.8))[place]
            right += agreement(Positions(*(part[..., mine] for part in vars(positions).values())), theirs) * mine.sum()
        assert rule.agreement == pytest.approx(right / len(ranks))
    # the direct bound is the quantile of a range that no sum of ranges is below
    assert (positions.direct <= positions.range[::-1].cumsum(0)[::-1] + 1e-5).all()
    assert rules[0].margins == pytest.approx(np.quantile(positions.direct.astype(float), 0.99, axis=-1).tolist())


def test_too_little_text_shows_no_agreement():
    positions = made_up(np.random.default_rng(0), 5, longest=40)
    rules = exit_rules(positions, positions.document)
    assert rules[0].margins is not None and rules[-1].margins is None and rules[-1].agreement is None
    assert exit_rules(positions, np.minimum(positions.document, 2)) == []
    assert exit_rules(random_positions(transitions=0), np.arange(500)) == []


def test_what_a_configuration_holds():
    rules = [{"stated": None, "margins": [2.0, 1.0]}, {"stated": 0.99, "margins": [0.5, 0.2]},
             {"stated": 0.999, "margins": None}]  # fmt: skip
    found = config_margins(rules)
    assert found == {"poe_agreement_margins": {"0.99": [0.5, 0.2]}, "poe_direct_p99_bounds": [2.0, 1.0]}
    config = make_model(**found).config
    again = type(config).from_dict(config.to_dict())
    assert again.poe_agreement_margins == found["poe_agreement_margins"] and config_margins([]) == {}
