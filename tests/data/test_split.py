from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_poe.data.split import NearDuplicates


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
