import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_poe.data.engine.groups import VALIDATION, _take, assign_splits, choose_validation, find_groups
from cognica_poe.data.engine.keys import hash_number
from cognica_poe.errors import UserError


def groups_of(sizes, given=None, sources=3, seed=0):
    """Groups of one document each, in turn of every source."""
    count = len(sizes)
    return find_groups(
        np.array([hash_number(seed, "validation", i) for i in range(count)], np.uint64),
        np.array([hash_number(seed, "sample", i) for i in range(count)], np.uint64),
        np.array(given or [0] * count, np.uint8),
        np.arange(count, dtype=np.uint16) % sources,
        np.array(sizes, np.uint32),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=10, max_size=60), st.floats(0.01, 0.4), st.integers(0, 5))
def test_validation_is_at_least_the_minimum_or_refused(sizes, fraction, seed):
    groups = groups_of(sizes, seed=seed)
    try:
        chosen = choose_validation(groups, np.ones(len(sizes), bool), fraction, 50)
    except UserError:
        # only where whole documents cannot make it
        assert max(sizes) > sum(sizes) / 10 or sum(sizes) < 1000
        return
    assert 50 <= groups.size[chosen].sum() <= sum(sizes) / 2 + 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.floats(0, 400))
def test_what_fits_is_taken_one_after_the_other(sizes, room):
    expected, left = [], room
    for place, size in enumerate(sizes):
        if size <= left:
            expected.append(place)
            left -= size
    assert _take(np.array(sizes, np.int64), room).tolist() == expected


def test_a_group_counts_for_the_source_that_it_holds_most_of():
    group = np.array([7, 7, 7, 9, 9], np.uint64)
    sources, sizes = np.array([0, 1, 1, 2, 1], np.uint16), np.array([10, 6, 6, 5, 5], np.uint32)
    groups = find_groups(group, group, np.zeros(5, np.uint8), sources, sizes)
    assert groups.size.tolist() == [22, 10] and groups.main.tolist() == [1, 1]
    assert groups.of_document.tolist() == [0, 0, 0, 1, 1]


def test_names_of_files_decide_and_a_sample_bounds_the_rest():
    given_splits = [VALIDATION] * 2 + [1] * 38
    groups = groups_of([100] * 40, given_splits, sources=2)
    assert (assign_splits(groups, 0.1, 100, None) == (groups.given == VALIDATION)).all()
    part = assign_splits(groups, 0.1, 100, 1000)
    assert ((part == 1) == (groups.given == VALIDATION)).all()  # never cut
    assert (part == 0).sum() == 10 and set(groups.main[part == 0]) == {0, 1}
    with pytest.raises(UserError, match="no text of their own"):
        assign_splits(groups_of([100] * 40, [1] * 40), 0.1, 100, None)
