import math

import numpy as np
import pytest

from cognica_poe.analysis.shares import design_effect, incomplete_beta, is_below, upper_limit


def test_incomplete_beta_is_a_binomial_tail():
    """I_x(k, n - k + 1) = P(Binomial(n, x) >= k)."""
    for n, k, x in ((20, 3, 0.1), (50, 40, 0.7), (200, 1, 0.001), (7, 7, 0.5)):
        tail = sum(math.comb(n, j) * x**j * (1 - x) ** (n - j) for j in range(k, n + 1))
        assert incomplete_beta(x, k, n - k + 1) == pytest.approx(tail, rel=1e-10)
    assert (incomplete_beta(0.0, 2, 3), incomplete_beta(1.0, 2, 3)) == (0.0, 1.0)
    assert incomplete_beta(0.3, 2.5, 4.5) + incomplete_beta(0.7, 4.5, 2.5) == pytest.approx(1.0)


def test_no_event_has_a_limit_above_zero():
    trials = np.full(5000, 10.0)
    limit = upper_limit(0 * trials, trials)
    assert limit == pytest.approx(1 - 0.05 ** (1 / 50_000), rel=1e-3)  # the rule of three
    assert is_below(0 * trials, trials, limit * 1.01) and not is_below(0 * trials, trials, limit * 0.99)
    assert upper_limit(trials, trials) == 1.0 and not is_below(trials, trials, 0.9)


def test_events_in_one_cluster_say_less_than_events_everywhere():
    trials, spread = np.full(20, 100.0), np.full(20, 2.0)
    crowded = np.zeros(20)
    crowded[3] = 40.0
    assert design_effect(spread, trials) == 1.0 < 10.0 < design_effect(crowded, trials)
    assert 0.02 < upper_limit(spread, trials) < upper_limit(crowded, trials)


def test_one_cluster_has_no_limit():
    with pytest.raises(ValueError, match="2 clusters or more"):
        upper_limit(np.array([1.0, 0.0]), np.array([9.0, 0.0]))


def test_limits_of_clusters_of_very_unequal_size_cover_the_share():
    """About 95 of 100 limits are above the true share, be a cluster as large as all others together."""
    generator, share, below = np.random.default_rng(0), 0.02, 0
    for _ in range(400):
        trials = np.ceil(generator.pareto(1.5, size=25) * 200 + 20)
        chance = generator.beta(2.0, 98.0, size=25)  # mean 0.02, differs between clusters
        below += upper_limit(generator.binomial(trials.astype(int), chance).astype(float), trials) < share
    assert 0.03 <= below / 400 <= 0.085
