"""Changes are paired, corrected for their number, and say noise where nothing changed."""

import math

import numpy as np
import pytest

from cognica_poe.analysis.bits_per_byte import DocumentSums, Positions
from cognica_poe.analysis.changes import _quantiles, _routed, between, changes, holm
from cognica_poe.analysis.routing import route
from cognica_poe.analysis.student import student
from cognica_poe.analysis.sums import BINS, EDGES, Sums, count_positions, pack, unpack
from cognica_poe.analysis.wand import bounds_of


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (2.571, 5, 0.05), (2.086, 20, 0.05), (3.850, 20, 0.001), (1.960, 10**6, 0.05),
     (0.0, 7, 1.0)],
)  # fmt: skip
def test_students_tail_is_that_of_the_tables(t, freedom, p):
    assert student(t, freedom) == pytest.approx(p, rel=2e-3)


def test_students_tail_is_the_integral_of_its_density():
    for n in (3, 4, 29, 30, 200):
        grid = np.linspace(-2.5, 2.5, 200_001)
        scale = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n * math.pi)
        inside = np.trapezoid(scale * (1 + grid**2 / n) ** (-(n + 1) / 2), grid)
        assert student(2.5, n) == pytest.approx(1 - inside, rel=1e-6)


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def _positions(seed: int, documents: int = 40, each: int = 200) -> Positions:
    generator = np.random.default_rng(seed)
    n = documents * each
    spread = generator.lognormal(0.0, 0.7, size=(2, n)).astype(np.float32)
    margin = generator.exponential(2.0, size=(2, n)).astype(np.float32)
    right = generator.random(n) < 0.6
    stage0 = right & (generator.random(n) > 0.3 * np.exp(-margin[0]))
    return Positions(np.repeat(np.arange(documents), each), margin, spread, margin > 1, spread, stage0, right)


def test_bins_stand_for_the_positions():
    positions = _positions(0)
    counts = count_positions(positions)
    assert counts.range.shape == (2, 40, BINS) and counts.margin.sum() == positions.margin.shape[1]
    found = [_quantiles(counts.range[k].sum(0, keepdims=True).astype(float))[0] for k in range(2)]
    assert found == pytest.approx(bounds_of(positions.range), rel=0.01)
    for cap in (0.01, 0.02, 0.05, 0.5):
        exact = route(positions, 0.5, cap=cap)
        binned = _routed(
            *(part.sum(0, keepdims=True).astype(float) for part in (counts.margin, counts.regressions)), cap
        )
        assert binned[0] == pytest.approx(exact.fraction, abs=0.02), cap
    assert count_positions(Positions(*(np.empty((0, 3)) for _ in range(7)))) is None


def test_values_outside_the_edges_are_counted():
    positions = _positions(1, documents=2, each=3)
    positions.range[:] = [[0.0, 1e-9, 1e9, EDGES[0], EDGES[-1], 1.0]]
    assert count_positions(positions).range[0].sum() == 6


def _series(generator, steps: int, documents: int, shifts: list[float]):
    """Records and sums of a run whose bits per byte moves by ``shifts``, documents of very unequal size."""
    sizes = np.maximum(50, generator.lognormal(6.0, 1.0, documents)).astype(np.int64)
    level = generator.normal(1.5, 0.3, documents)
    records, sums = [], {}
    for step in range(steps):
        level = level + shifts[step] + generator.normal(0.0, 0.02, documents)
        nats = level * sizes * math.log(2)
        correct = generator.binomial(sizes, 0.4).astype(float)
        documents_sums = DocumentSums(
            sizes, sizes, {"full": nats, "stage0": nats}, {"full": correct, "stage0": correct}
        )
        sums[step] = Sums(documents_sums)
        bpb = nats.sum() / math.log(2) / sizes.sum()
        records.append(
            {"step": step, "validation": {"sha256": "a"}, "bpb": {"full": bpb, "stage": [bpb]}, "speculative": {},
             "wand_bounds": [], "routing": None}
        )  # fmt: skip
    return records, sums


def test_where_nothing_changes_few_tables_hold_a_signal():
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        found, number = changes(*_series(generator, 12, 40, [0.0] * 12))
        assert number == {"bpb": 11, "accuracy": 11}
        wrong += any(row.figures["bpb.full"].signal for row in found.values() if row.figures)
    assert wrong <= 7, "5 % of 60 tables are 3; more than 7 come by chance once in 60 times"


def test_a_real_change_is_a_signal_and_the_rest_noise():
    generator = np.random.default_rng(1)
    shifts = [0.0, 0.0, -0.1, 0.0, 0.05, 0.0]
    found, _ = changes(*_series(generator, 6, 60, shifts))
    assert [found[step].figures["bpb.full"].signal for step in range(1, 6)] == [False, True, False, True, False]
    change = found[2].figures["bpb.full"]
    assert change.low < change.value < change.high and change.value == pytest.approx(-0.1, abs=0.02)
    assert [found[step].base for step in range(6)] == [None, 0, 1, 2, 3, 4]


def test_a_record_without_sums_is_said():
    records, sums = _series(np.random.default_rng(2), 3, 10, [0.0] * 3)
    del sums[1]
    found, number = changes(records, sums)
    assert found[1].reason == found[2].reason == "step 1 has no sums" and number == {}


def test_records_of_other_units_are_not_paired():
    records, sums = _series(np.random.default_rng(2), 3, 12, [0.0, 0.5, 0.5])
    plain, _ = changes(records, sums)
    files = np.arange(12) // 2
    sums[1].units = sums[2].units = files
    stored = {step: unpack(pack(some), "here", "again") for step, some in sums.items()}
    assert stored[0].units is None and np.array_equal(stored[1].units, files)
    found, _ = changes(records, stored)
    assert found[1].reason == "other units" and found[2].reason is None
    one, other = found[2].figures["bpb.full"], plain[2].figures["bpb.full"]
    assert one.value == other.value and (one.low, one.high) != (other.low, other.high)
    assert between(records[0], records[1], stored[0], stored[1]) == {}
    assert between(records[1], records[2], stored[1], stored[2])
