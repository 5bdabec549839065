"""Rows of parameters on ranks: nothing lost, nothing twice, padding without effect, owners equally busy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_poe.training.optim.muon import orthogonalize
from cognica_poe.training.parallel.sharding import Bucket, assign_owners, newton_schulz_cost, row_range, rows_per_rank

worlds, rows = st.integers(1, 9), st.integers(0, 40)


@given(rows, worlds)
def test_every_row_is_on_one_rank(count, world):
    ranges = [row_range(count, rank, world) for rank in range(world)]
    assert [row for first, last in ranges for row in range(first, last)] == list(range(count))
    assert max(last - first for first, last in ranges) == rows_per_rank(count, world)


def test_rows_of_the_released_vocabulary():
    """32768 rows on 12 ranks travel like 32772."""
    assert rows_per_rank(32768, 12) * 12 == 32772
    assert row_range(32768, 11, 12) == (30041, 32768)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4), worlds)
def test_a_bucket_returns_what_was_put_in(shapes, world):
    full = {f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    bucket = Bucket({name: value.shape for name, value in full.items()}, world)
    lines = bucket.new_lines(torch.float32, torch.device("cpu"))
    for name, value in full.items():
        bucket.put(lines, name, value)
    padding = lines.numel() - sum(value.numel() for value in full.values())
    assert padding == sum((rows_per_rank(r, world) * world - r) * c for r, c in shapes)
    for name, value in full.items():
        shards = [bucket.shard(lines[rank], name, rank) for rank in range(world)]
        assert torch.equal(torch.cat(shards), value)
        back = torch.zeros_like(value)
        bucket.get(lines, name, back)
        assert torch.equal(back, value)
    assert lines.count_nonzero() == sum(value.count_nonzero() for value in full.values())


def test_transposed_gradients_are_put_in_order():
    full = torch.randn(3, 5).T
    bucket = Bucket({"p": full.shape}, 2)
    lines = bucket.new_lines(torch.float32, torch.device("cpu"))
    bucket.put(lines, "p", full)
    assert torch.equal(torch.cat([bucket.shard(lines[rank], "p", rank) for rank in range(2)]), full)


def test_a_parameter_without_dimensions_is_refused():
    with pytest.raises(ValueError, match="scalar has no dimension"):
        Bucket({"scalar": torch.Size()}, 2)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12), worlds)
def test_owners_are_busy_alike(shapes, world):
    named = {f"p{i}": torch.Size(shape) for i, shape in enumerate(shapes)}
    owners = assign_owners(named, world)
    assert owners == assign_owners(dict(reversed(named.items())), world)  # whatever the order
    work = [sum(newton_schulz_cost(named[n]) for n in named if owners[n] == rank) for rank in range(world)]
    costs = sorted((newton_schulz_cost(shape) for shape in shapes), reverse=True)
    bound = max(costs[0], sum(costs) / world, sum(costs[world - 1 : world + 1]) if len(costs) > world else 0)
    assert max(work) <= 4 / 3 * bound + 1e-9


def test_owners_of_the_released_shapes():
    """192 matrices on 12 ranks; whole stacks in ceil(K / N) slots leave the last rank idle, here all work alike."""
    shapes = {}
    for i in range(32):
        shapes |= {f"{i}.q": (2048, 2048), f"{i}.o": (2048, 2048), f"{i}.k": (1024, 2048), f"{i}.v": (1024, 2048)}
        shapes |= {f"{i}.up": (12800, 2048), f"{i}.down": (2048, 12800)}
    owners = assign_owners({name: torch.Size(shape) for name, shape in shapes.items()}, 12)
    work = [sum(newton_schulz_cost(shapes[n]) for n in shapes if owners[n] == rank) for rank in range(12)]
    assert max(work) <= 1.01 * sum(work) / 12


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5)])
def test_zero_rows_change_no_polar_factor(shape):
    x = torch.randn(1, *shape, dtype=torch.float64)
    padded = torch.cat((x, torch.zeros(1, 4, shape[1], dtype=torch.float64)), dim=1)
    y = orthogonalize(padded)
    torch.testing.assert_close(y[:, : shape[0]], orthogonalize(x), atol=1e-9, rtol=1e-9)
    assert not y[:, shape[0] :].any()
