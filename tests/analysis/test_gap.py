"""A gap as compute: the fit, its inverse, the figures that the scale is known by."""

import pytest

from cognica_poe.analysis.gap import compute_factor, depth_yield, loss

SMALLER, LARGER = (1_384_122_122, 26_430 * 512 * 2048), (3_019_900_506, 83_923 * 384 * 2048)


def test_the_factor_undoes_the_fit():
    parameters, tokens = SMALLER
    for factor in (0.5, 1.2, 4.0):
        gap = loss(parameters / factor**0.5, tokens / factor**0.5) / loss(parameters, tokens) - 1.0
        assert compute_factor(gap, parameters, tokens) == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(
    ("gap", "size", "factor"), [(0.065, SMALLER, 3.1), (0.01, SMALLER, 1.2), (0.065, LARGER, 3.9), (0.01, LARGER, 1.26)]
)
def test_known_sizes(gap, size, factor):
    assert compute_factor(gap, *size) == pytest.approx(factor, rel=0.1)


def test_no_gap_is_no_factor():
    assert compute_factor(0.0, *SMALLER) == pytest.approx(1.0)
    assert compute_factor(-0.01, *SMALLER) < 1.0
    with pytest.raises(ValueError, match="beyond a factor"):
        compute_factor(50.0, *SMALLER)


def test_what_depth_yields():
    assert depth_yield(2.0, 1.8, 1.9) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="gains nothing"):
        depth_yield(1.8, 1.8, 1.7)
