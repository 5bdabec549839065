import numpy as np
import pytest

from cognica_poe.analysis.bits_per_byte import Positions
from cognica_poe.analysis.routing import READINGS, route, routing_curve, stage0_cost
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from tests.analysis.test_wand import random_positions


def slow_route(positions, cap):
    """Try every threshold."""
    margins = positions.margin[0]
    best = 0
    for threshold in margins:
        routed = margins >= threshold
        regressions = (routed & positions.full_correct & ~positions.stage0_correct).sum()
        if regressions <= cap * routed.sum():
            best = max(best, int(routed.sum()))
    return best / len(margins)


@pytest.mark.parametrize("cap", [0.0, 0.02, 0.1, 0.24, 1.0])
def test_largest_routable_share(cap):
    positions = random_positions(300, seed=2)
    positions.margin[0] = np.round(positions.margin[0], 1)  # many equal margins
    result = route(positions, cost=0.51, cap=cap)
    assert result.fraction == pytest.approx(slow_route(positions, cap))
    assert result.regression_rate <= cap
    assert result.projected_speedup == pytest.approx(1 / (1 - 0.49 * result.fraction))
    if result.fraction:
        assert (positions.margin[0] >= result.threshold).mean() == pytest.approx(result.fraction)


def test_nothing_is_routable_if_the_surest_position_regresses():
    positions = random_positions(50)
    positions.full_correct[:], positions.stage0_correct[:] = True, False
    result = route(positions, cost=0.5)
    assert (result.fraction, result.threshold, result.projected_speedup) == (0.0, None, 1.0)


def test_published_speedups():
    """The card's routed fractions and projected speed-ups, at its stage-0 cost of 0.51."""
    for fraction, speedup in ((0.8505, 1.715), (0.5994, 1.416), (0.9076, 1.801)):
        count = round(fraction * 10_000)
        positions = random_positions(10_000)
        positions.margin[0] = np.arange(10_000)
        positions.full_correct[:] = True
        positions.stage0_correct[:] = np.arange(10_000) >= 10_000 - count
        result = route(positions, cost=0.51, cap=0.0)
        assert result.fraction == pytest.approx(fraction)
        assert result.projected_speedup == pytest.approx(speedup, abs=6e-4)


def test_stage0_cost_counts_layers_and_heads():
    config = CognicaPoEConfig(poe_stage_layers=[16, 6, 5, 5])
    layer = 2048 * (2 * 2048 + 2 * 1024 + 2 * 12800)
    head = 32768 * 2048
    assert stage0_cost(config) == pytest.approx((16 * layer + head) / (32 * layer + 4 * head))
    assert stage0_cost(CognicaPoEConfig(poe_stage_layers=[32])) == 1.0


def test_one_stage_cannot_route():
    with pytest.raises(ValueError, match="two stages"):
        route(random_positions(transitions=0), cost=1.0)


def slow_share(positions, cap, counted, of):
    """Try every threshold of every reading."""
    margins, best = positions.margin[0], 0.0
    for threshold in margins:
        routed = margins >= threshold
        events = (routed & positions.full_correct & ~positions.stage0_correct).sum()
        if counted == "net":
            events = events - (routed & positions.stage0_correct & ~positions.full_correct).sum()
        if events <= cap * (routed.sum() if of == "routed" else len(margins)):
            best = max(best, routed.mean())
    return best


def test_the_curve_has_every_cap_in_every_reading():
    positions = random_positions(600, seed=3)
    positions.margin[0] = np.round(positions.margin[0], 1)
    caps = (0.05, 0.1, 0.2)
    curve = routing_curve(positions, positions.document, caps)
    assert [(point.counted, point.of, point.cap) for point in curve] == [
        (*reading, cap) for reading in READINGS for cap in caps
    ]
    for point in curve:
        assert point.fraction == pytest.approx(slow_share(positions, point.cap, point.counted, point.of))
        assert point.low <= point.fraction <= point.high
        assert point.threshold is None or (positions.margin[0] >= point.threshold).mean() == point.fraction
    assert curve[1].fraction == route(positions, 0.5, cap=0.1).fraction
    shares = {(point.counted, point.of): point.fraction for point in curve if point.cap == 0.1}
    assert shares["lost", "routed"] <= shares["lost", "all"] <= shares["net", "all"]


def test_thresholds_are_tested_on_documents_that_did_not_choose_them():
    positions = random_positions(900, seed=4)
    point = routing_curve(positions, positions.document, (0.26,))[0]
    ranks, routed = np.unique(positions.document, return_inverse=True)[1], np.zeros(900, dtype=bool)
    for fold in range(5):
        mine = ranks % 5 == fold
        others = Positions(*(part[..., ~mine] for part in vars(positions).values()))
        routed[mine] = positions.margin[0][mine] >= route(others, 0.5, cap=0.26).threshold
    lost = positions.full_correct & ~positions.stage0_correct
    assert point.tested_fraction == pytest.approx(routed.mean())
    assert point.tested_rate == pytest.approx(lost[routed].mean())
    alone = routing_curve(positions, np.zeros(900, dtype=int), (0.26,))[0]
    assert (alone.low, alone.high, alone.tested_rate) == (None, None, None) and alone.fraction == point.fraction
