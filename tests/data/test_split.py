from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_poe.data.split import NearDuplicates, assign_splits, choose_validation
from cognica_poe.errors import UserError


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 12), max_size=12), min_size=1, max_size=6), st.sets(st.integers(0, 12)))
def test_near_duplicates_agree_with_the_definition(validation, candidate):
    def text(numbers):
        return "\n".join(f"{n:02d}" * 25 for n in sorted(numbers))

    shared = candidate & set().union(*validation)
    expected = len(shared) >= 3 and (
        2 * len(shared) >= len(candidate)
        or any(len(candidate & v) >= 3 and 2 * len(candidate & v) >= len(v) for v in validation)
    )
    assert (text(candidate) in NearDuplicates(map(text, validation))) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=10, max_size=60), st.floats(0.01, 0.4), st.integers(0, 5))
def test_validation_is_at_least_the_minimum_or_refused(sizes, fraction, seed):
    groups = {f"g{i}": Counter({f"s{i % 3}": size}) for i, size in enumerate(sizes)}
    try:
        chosen = choose_validation(groups, fraction, 50, seed)
    except UserError:
        # only where whole documents cannot make it
        assert max(sizes) > sum(sizes) / 10 or sum(sizes) < 1000
        return
    held = sum(sizes[int(key[1:])] for key in chosen)
    assert 50 <= held <= sum(sizes) / 2 + 1


def test_names_of_files_decide_and_a_sample_bounds_the_rest():
    groups = {f"g{i}": Counter({f"s{i % 2}": 100}) for i in range(40)}
    options = {"fraction": 0.1, "min_bytes": 100, "seed": 0}
    given_splits = {key: "val" if key in ("g0", "g1") else "train" for key in groups}
    assert assign_splits(groups, given_splits, **options) == given_splits
    part = assign_splits(groups, given_splits, max_bytes=1000, **options)
    assert {key for key, split in part.items() if split == "val"} == {"g0", "g1"}  # never cut
    kept = {key for key, split in part.items() if split == "train"}
    assert len(kept) == 10 and len({f"s{int(key[1:]) % 2}" for key in kept}) == 2
    with pytest.raises(UserError, match="no text of their own"):
        assign_splits(groups, dict.fromkeys(groups, "train"), **options)


def test_without_given_splits_validation_is_cut():
    groups = {f"g{i}": Counter({"s": 100}) for i in range(40)}
    split_of = assign_splits(groups, {}, fraction=0.1, min_bytes=100, seed=0)
    held = choose_validation(groups, 0.1, 100, 0)
    assert split_of == {key: "val" if key in held else "train" for key in groups}
