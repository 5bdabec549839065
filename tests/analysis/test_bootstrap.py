import numpy as np
import pytest

from cognica_poe.analysis.bootstrap import Bootstrap, Interval
from cognica_poe.analysis.student import tail_of


def slow_bootstrap(statistic, sizes, resamples, seed, confidence=0.95):
    """The obvious bootstrap: draw whole documents one by one, recompute the statistic; percentiles expanded alike."""
    documents = len(sizes)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = [int(generator.integers(documents)) for _ in range(documents)]
        values.append(statistic(drawn))
    values.sort()
    tail = tail_of(round(sizes.sum() ** 2 / (sizes**2).sum()), confidence)
    return values[int(tail * resamples)], values[int((1 - tail) * resamples) - 1]


@pytest.fixture(scope="module")
def sums():
    generator = np.random.default_rng(3)
    count = generator.integers(20, 400, size=40).astype(float)
    return count * generator.normal(3.0, 0.5, size=40), count


def test_ratio_interval_matches_drawing_documents_one_by_one(sums):
    nats, count = sums
    fast = Bootstrap(40, resamples=4000, seed=1).ratio(nats, count, scale=2.0)
    low, high = slow_bootstrap(lambda drawn: 2.0 * nats[drawn].sum() / count[drawn].sum(), count, 4000, seed=2)
    width = high - low
    assert fast.value == pytest.approx(2.0 * nats.sum() / count.sum(), rel=1e-12)
    assert fast.low == pytest.approx(low, abs=0.06 * width)
    assert fast.high == pytest.approx(high, abs=0.06 * width)


def test_difference_is_paired(sums):
    nats, count = sums
    better = nats - 0.01 * count  # a constant shift per token: the unpaired spread is much larger than 0.01
    bootstrap = Bootstrap(40, seed=1)
    difference = bootstrap.difference(better, count, nats, count)
    assert difference.value == pytest.approx(-0.01)
    assert (difference.low, difference.high) == pytest.approx((-0.01, -0.01), abs=1e-9)
    assert difference.signal
    unpaired = bootstrap.ratio(nats, count)
    assert unpaired.high - unpaired.low > 0.1


def test_difference_matches_drawing_documents_one_by_one(sums):
    nats, count = sums
    other = nats + np.random.default_rng(9).normal(0, 20, size=40)
    fast = Bootstrap(40, resamples=4000, seed=4).difference(nats, count, other, count)
    low, high = slow_bootstrap(lambda drawn: (nats - other)[drawn].sum() / count[drawn].sum(), count, 4000, seed=5)
    assert fast.low == pytest.approx(low, abs=0.06 * (high - low))
    assert fast.high == pytest.approx(high, abs=0.06 * (high - low))


@pytest.mark.parametrize(("documents", "spread"), [(17, 0.3), (20, 1.0), (40, 1.0), (30, 1.5), (60, 1.5)])
def test_intervals_cover_what_they_say_for_documents_of_very_unequal_size(documents, spread):
    generator, hits, trials = np.random.default_rng(0), 0, 1000
    for trial in range(trials):
        count = np.maximum(50, generator.lognormal(6.0, spread, documents))
        interval = Bootstrap(documents, resamples=600, seed=trial).ratio(
            count * generator.normal(1.0, 0.3, documents), count
        )
        hits += interval.low <= 1.0 <= interval.high
    assert 0.93 <= hits / trials <= 0.97


def test_equal_documents_are_expanded_as_students_t_asks():
    assert tail_of(10**6, 0.95) == pytest.approx(0.025, rel=1e-4)
    # n = 10: t = 2.262 with 9 degrees of freedom, times sqrt(10 / 9), is 2.384 standard errors
    assert tail_of(10, 0.95) == pytest.approx(0.00856, rel=2e-3)


def test_seed_fixes_the_result_and_blocks_do_not_matter(sums, monkeypatch):
    nats, count = sums
    first = Bootstrap(40, seed=7).ratio(nats, count)
    assert Bootstrap(40, seed=7).ratio(nats, count) == first
    assert Bootstrap(40, seed=8).ratio(nats, count) != first
    monkeypatch.setattr("cognica_poe.analysis.bootstrap._BLOCK_BYTES", 8 * 40 * 3)  # 3 resamples at a time
    by_threes = Bootstrap(40, seed=7).ratio(nats, count)
    # The same draws; the matrix product may add them in another order when it gets fewer rows.
    assert (by_threes.low, by_threes.high) == pytest.approx((first.low, first.high), rel=1e-12)


def test_ratios_equal_single_ratios(sums):
    nats, count = sums
    bootstrap = Bootstrap(40, seed=7)
    assert bootstrap.ratios(np.stack([nats, 2 * nats]), count)[0] == bootstrap.ratio(nats, count)
    assert bootstrap.ratios(np.stack([nats, 2 * nats]), count)[1].value == pytest.approx(2 * nats.sum() / count.sum())


def test_signal_excludes_zero():
    assert Interval(1.0, 0.1, 2.0).signal and Interval(-1.0, -2.0, -0.1).signal
    assert not Interval(0.5, -0.1, 1.0).signal and not Interval(0.0, 0.0, 0.0).signal


def test_documents_without_trials_are_tolerated():
    interval = Bootstrap(2, seed=0).ratio([0.0, 3.0], [0.0, 4.0])
    assert interval.value == 0.75 and interval.low == interval.high == 0.75


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Bootstrap(1)
    with pytest.raises(ValueError, match="confidence"):
        Bootstrap(3, confidence=1.0)
    with pytest.raises(ValueError, match=r"\[3, M\]"):
        Bootstrap(3).ratio([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="zero in every"):
        Bootstrap(2).ratio([0.0, 0.0], [0.0, 0.0])


def test_documents_of_one_file_are_drawn_together():
    """Documents of a file resemble one another: intervals by files cover what they say, those by documents do not."""
    generator, hits, trials = np.random.default_rng(0), {"files": 0, "documents": 0}, 600
    for trial in range(trials):
        pieces = generator.integers(1, 7, size=25)
        files = np.repeat(np.arange(25), pieces)
        count = np.maximum(50, generator.lognormal(6.0, 1.0, len(files)))
        rate = generator.normal(1.0, 0.3, 25)[files] + generator.normal(0.0, 0.05, len(files))
        for name, units in (("files", files), ("documents", None)):
            bootstrap = Bootstrap(len(files), units=units, resamples=600, seed=trial)
            interval = bootstrap.ratio(rate * count, count)
            hits[name] += interval.low <= 1.0 <= interval.high
    assert 0.93 <= hits["files"] / trials <= 0.97
    assert hits["documents"] / trials < 0.9


def test_units_are_their_sums(sums):
    nats, count = sums
    files = np.arange(40) // 3
    by_file = [np.bincount(files, weights=column) for column in (nats, count)]
    together = Bootstrap(40, units=files * 5 + 2, seed=3).ratio(nats, count)
    whole = Bootstrap(14, seed=3).ratio(*by_file)
    assert (together.low, together.high) == pytest.approx((whole.low, whole.high))
    assert together.value == Bootstrap(40, seed=3).ratio(nats, count).value
    assert Bootstrap(40, units=np.arange(40), seed=3).ratio(nats, count) == Bootstrap(40, seed=3).ratio(nats, count)
    with pytest.raises(ValueError, match="1 units"):
        Bootstrap(3, units=np.zeros(3, dtype=int))
