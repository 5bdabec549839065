import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_poe.data.cleaning.duplicates import clusters, dropped, equal_pairs, rank_of


def slow_clusters(columns):
    """Least member of each document's cluster, by walking over everything."""
    count = len(columns[0])
    label = list(range(count))
    for _ in range(count):
        for column in columns:
            for i in range(count):
                label[i] = min(label[j] for j in range(count) if column[i] == column[j])
    return label


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(st.integers(0, 6), min_size=n, max_size=n), min_size=1,
                                                     max_size=4)))  # fmt: skip
def test_clusters_are_all_that_a_chain_links(columns):
    columns = np.array(columns, np.uint64)
    label = clusters(columns.shape[1], (equal_pairs(column) for column in columns))
    assert label.tolist() == slow_clusters(columns.tolist())


def test_one_long_chain():
    count = 100_000
    order = np.random.default_rng(0).permutation(count)
    links = np.stack([order[:-1], order[1:]], axis=1)
    assert not clusters(count, [links[::2], links[1::2]]).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=20), st.randoms())
def test_the_survivor_does_not_depend_on_the_order_of_reading(documents, rng):
    """(cluster, source) pairs; the place in the list stands for the hash of the origin."""

    def kept(order):
        label = clusters(len(order), [equal_pairs(np.array([documents[i][0] for i in order]))])
        rank = rank_of(np.array([documents[i][1] for i in order]), np.array(order))
        return {i for i, gone in zip(order, dropped(label, rank), strict=True) if not gone}

    order = list(range(len(documents)))
    rng.shuffle(order)
    by_cluster = {}
    for number, (cluster, source) in enumerate(documents):
        by_cluster[cluster] = min(by_cluster.get(cluster, (9, 0)), (source, number))
    assert kept(order) == {number for _, number in by_cluster.values()}


def test_nothing_to_do():
    assert clusters(0, [equal_pairs(np.zeros(0, np.uint64))]).tolist() == []
    assert dropped(np.arange(3), np.array([2, 0, 1])).tolist() == [False] * 3
