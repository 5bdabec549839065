"""Ranks find each other after restarts, agree on outcomes and share errors."""

import gc
import threading
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cognica_poe.errors import UserError
from cognica_poe.training.parallel.exchange import StackExchange
from cognica_poe.training.parallel.ranks import Pending, Ranks, agree_on_prefix
from tests.gloo import run_ranks


@pytest.mark.parametrize("late", [0, 1, 2])
def test_every_attempt_gets_a_word_of_its_own(late):
    """Three attempts over one store, which keeps what dead ranks wrote; one rank comes late."""
    store, words = dist.HashStore(), []
    for _ in range(3):
        heard = {}

        def join(rank, heard=heard):
            time.sleep(0.1 if rank == late else 0.0)
            heard[rank] = agree_on_prefix(store, rank, 3, timedelta(seconds=20))

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(heard) == 3 and len(set(heard.values())) == 1
        words.append(heard[0])
    assert len(set(words)) == 3


def test_a_peer_that_never_comes_is_named():
    with pytest.raises(TimeoutError, match="rank 1 did not join"):
        agree_on_prefix(dist.HashStore(), 0, 2, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="the first rank did not join"):
        agree_on_prefix(dist.HashStore(), 1, 2, timedelta(seconds=0.1))


def agree(ranks):
    def fail(who):
        if ranks.rank == who:
            raise UserError(f"rank {who} failed")
        return ranks.rank

    heard = []
    for attempt in (lambda: ranks.on_first(lambda: fail(0)), lambda: ranks.on_all(lambda: fail(2))):
        try:
            attempt()
        except UserError as error:
            heard.append(str(error))
    flags = ranks.any([ranks.rank == 1, False])
    mean = ranks.mean(torch.tensor([float(ranks.rank), float("nan") if ranks.rank == 1 else 0.0]))
    return heard, ranks.on_first(lambda: ranks.rank), ranks.on_all(lambda: ranks.rank), flags, mean.tolist()


def test_outcomes_and_errors_are_shared():
    for heard, first, everyone, flags, mean in run_ranks(3, agree):
        assert heard == ["rank 0 failed", "rank 2 failed"]
        assert first == 0 and everyone == [0, 1, 2] and flags == [True, False]
        assert mean[0] == 1.0 and mean[1] != mean[1]


def test_alone_nothing_is_exchanged():
    ranks = Ranks()
    assert ranks.on_first(lambda: 5) == 5 and ranks.on_all(lambda: 5) == [5] and ranks.any([True]) == [True]
    with pytest.raises(UserError, match="no"):
        ranks.on_all(lambda: (_ for _ in ()).throw(UserError("no")))
    assert ranks.mean(torch.tensor(2.0)) == 2.0


def die(ranks):
    if ranks.rank == 1:
        raise RuntimeError("broken")
    ranks.any([False])


def test_the_helper_reports_the_rank_that_broke():
    with pytest.raises(AssertionError, match=r"rank 1: (.|\n)*RuntimeError: broken"):
        run_ranks(2, die)


def hang(ranks):
    if ranks.rank == 1:
        time.sleep(60)


def test_the_helper_ends_what_hangs():
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] hung"):
        run_ranks(2, hang, timeout=3.0)


class Waited:
    """A handle that notes whether its buffer was still alive when it was waited for."""

    def __init__(self, buffer):
        self.buffer, self.alive = weakref.ref(buffer), None

    def wait(self):
        self.alive = self.buffer() is not None


def test_buffers_live_until_they_are_waited_for():
    buffer = torch.ones(3)
    work = Waited(buffer)
    pending = Pending(work, buffer)
    del buffer
    gc.collect()
    assert work.buffer() is not None
    pending.wait()
    assert work.alive and work.buffer() is None


def exchange_with_empty_shares(ranks):
    """All-to-all in which only the last rank owns anything; then the connections of a thread of their own."""
    full = torch.arange(10.0).view(5, 2)
    exchange = StackExchange((5, 2), ["a"], {"a": ranks.world - 1}, ranks)
    first, last = exchange.ranges[ranks.rank]
    arrived, pending = exchange.to_owners({"a": full[first:last]})
    pending.wait()
    stack = exchange.stack(arrived)
    back, pending = exchange.to_shards(stack * 2)
    pending.wait()
    return stack, exchange.shards(back)["a"], ranks.in_background().on_all(lambda: ranks.rank)


@pytest.mark.parametrize("world", [2, 4])
def test_matrices_travel_to_their_owner_and_back(world):
    outcomes = run_ranks(world, exchange_with_empty_shares)
    full = torch.arange(10.0).view(5, 2)
    assert torch.equal(outcomes[-1][0][0], full)
    assert all(stack.numel() == 0 for stack, *_ in outcomes[:-1])
    assert torch.equal(torch.cat([rows for _, rows, _ in outcomes]), 2 * full)
    assert all(said == list(range(world)) for *_, said in outcomes)


def _wait_for_a_slow_first(ranks, patient):
    """The default group of a second process group, which waits for a second; the first rank takes three."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    ranks = ranks.patiently() if patient else ranks
    return ranks.on_first(lambda: time.sleep(3) or "made")


def test_ranks_wait_for_what_the_first_one_prepares():
    assert run_ranks(2, _wait_for_a_slow_first, True) == ["made", "made"]
    with pytest.raises(AssertionError, match=r"(?i)timed out|timeout"):
        run_ranks(2, _wait_for_a_slow_first, False)
