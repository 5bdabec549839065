"""The processes of one training run and what they say to each other.

``Ranks`` is the only place that knows whether there is a process group: with one rank every call is local, so that
the trainer reads the same with and without torchrun.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from cognica_poe.errors import UserError

T = TypeVar("T")
_REMEDY = "start with torchrun, which sets it, or unset WORLD_SIZE"
TIMEOUT = timedelta(minutes=15)
"""How long a rank waits for another within a step: this long a peer that hangs costs all of them."""
PATIENCE = timedelta(days=7)
"""How long ranks wait while the first one makes data and tokenizer, which takes hours for a large recipe."""


class Pending:
    """A collective under way. Holds its buffers: the backend reads and writes them until ``wait`` returns."""

    def __init__(self, work: dist.Work | None, *buffers: torch.Tensor):
        self.work, self.buffers = work, buffers

    def wait(self) -> None:
        """Until the buffers may be read (on CUDA: until the current stream may read them)."""
        if self.work is not None:
            self.work.wait()
        self.work, self.buffers = None, ()


@dataclass(frozen=True)
class Ranks:
    """One process among ``world``.

    Methods are collective: every rank calls them in the same order.
    """

    rank: int = 0
    world: int = 1
    restarts: int = 0
    """How often torchrun has restarted the workers since it was launched."""
    group: dist.ProcessGroup | None = None
    """Who speaks here; all processes of the run when None."""

    @property
    def is_first(self) -> bool:
        """The rank that logs, releases and decides."""
        return self.rank == 0

    @property
    def leads_machine(self) -> bool:
        """Of the ranks of one machine the one that does what is done once there."""
        return os.environ.get("LOCAL_RANK", str(self.rank)) == "0"

    def on_first(self, function: Callable[[], T]) -> T:
        """``function()`` of rank 0, on every rank; the others wait. A UserError of rank 0 is raised everywhere."""
        outcome: tuple[Any, str | None] = (None, None)
        if self.is_first:
            outcome = _attempt(function)
        if self.world > 1:
            box = [outcome]
            dist.broadcast_object_list(box, src=0, group=self.group)
            outcome = box[0]
        if outcome[1] is not None:
            raise UserError(outcome[1])
        result: T = outcome[0]
        return result

    def on_all(self, function: Callable[[], T]) -> list[T]:
        """``function()`` on every rank; results in rank order. The first UserError of any rank is raised everywhere."""
        outcomes: list[tuple[Any, str | None]] = [_attempt(function)] * self.world
        if self.world > 1:
            dist.all_gather_object(outcomes, outcomes[self.rank], group=self.group)
        for _, error in outcomes:
            if error is not None:
                raise UserError(error)
        return [result for result, _ in outcomes]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which flags are raised on at least one rank. Speaks over the processors: never waits for an accelerator."""
        if self.world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in raised.tolist()]

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over ranks of a small tensor, in place; NaN and infinity of one rank reach all of them."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
            tensor /= self.world
        return tensor

    def in_background(self) -> Ranks:
        """The same ranks over connections of their own, for agreements in a thread beside the training steps."""
        group = dist.new_group(backend="gloo") if self.world > 1 else None
        return replace(self, group=group)

    def patiently(self) -> Ranks:
        """The same ranks over connections of their own, on which they wait for each other as long as ``PATIENCE``."""
        group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.world > 1 else None
        return replace(self, group=group)

    # ---- the three exchanges of a training step ------------------------------------------------------------------

    def reduce_scatter(self, out: torch.Tensor, buffer: torch.Tensor) -> Pending:
        """Sum ``buffer`` ``[world, n]`` over ranks; ``out`` ``[n]`` becomes this rank's row of the sum."""
        return Pending(dist.reduce_scatter_single(out, buffer.view(-1), async_op=True), out, buffer)

    def all_gather(self, out: torch.Tensor, chunk: torch.Tensor) -> Pending:
        """``out`` ``[world, n]`` becomes the ``chunk`` ``[n]`` of every rank."""
        return Pending(dist.all_gather_single(out.view(-1), chunk, async_op=True), out, chunk)

    def all_to_all(self, out: torch.Tensor, received: list[int], buffer: torch.Tensor, sent: list[int]) -> Pending:
        """Send ``sent[r]`` elements of flat ``buffer`` to rank r, receive ``received[r]`` from it into flat ``out``."""
        return Pending(dist.all_to_all_single(out, buffer, received, sent, async_op=True), out, buffer)

    def warm_up(self, device: torch.device) -> None:
        """One of each exchange over ranks, so that connections stand before ranks drift apart.

        The first all-to-all of a multi-node job can otherwise deadlock while connections are being made.
        """
        if self.world == 1:
            return
        ones, out = torch.ones(self.world, device=device), torch.empty(self.world, device=device)
        even = [1] * self.world
        self.reduce_scatter(out[:1], ones).wait()
        self.all_gather(out, ones[:1]).wait()
        self.all_to_all(out, even, ones, even).wait()
        self.mean(ones)
        self.any([False])


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return function(), None
    except UserError as error:
        return None, str(error)


@contextlib.contextmanager
def join_ranks(timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """The ranks that torchrun announces in the environment; a single one without it.

    Numbers on processors go over gloo, those on CUDA over NCCL; each rank takes the CUDA device of its local rank, and
    NCCL is told so that it connects all ranks at once. Raises UserError as :func:`announced_world`.
    """
    world = announced_world()
    restarts = _announced("TORCHELASTIC_RESTART_COUNT", 0, 2**31, "0")
    if world == 1:
        yield Ranks(restarts=restarts)
        return
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", _announced("LOCAL_RANK", 0, torch.cuda.device_count(), "0"))
        torch.cuda.set_device(device)
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(agree_on_prefix(store, rank, world, timeout), store)
    backend = "cpu:gloo,cuda:nccl" if device else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)
    ranks = Ranks(rank, world, restarts)
    ranks.warm_up(device or torch.device("cpu"))
    yield ranks
    dist.destroy_process_group()  # not after an exception: peers may hang in it, and the process ends anyway


def announced_world() -> int:
    """How many processes the environment announces. Raises UserError unless it names all that joining them takes."""
    world = _announced("WORLD_SIZE", 1, 2**20, "1")
    if world > 1:
        _announced("RANK", 0, world)
        _announced("LOCAL_RANK", 0, world, "0")
        _announced("MASTER_PORT", 1, 2**16)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError(f"WORLD_SIZE is {world} and MASTER_ADDR is missing: {_REMEDY}")
    return world


def _announced(name: str, low: int, end: int, usual: str | None = None) -> int:
    """The number that the environment gives, from ``low`` to below ``end``."""
    text = os.environ.get(name, usual)
    if text is None:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {name} is missing: {_REMEDY}")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not low <= int(text) < end:
        raise UserError(f"{name} in the environment is {text!r:.40}, no number from {low} to {end - 1}: {_REMEDY}")
    return int(text)


def agree_on_prefix(store: dist.Store, rank: int, world: int, timeout: timedelta = TIMEOUT) -> str:
    """A word that the ranks of this attempt share and that no earlier attempt has used.

    torchrun keeps one store over restarts, in which a rank would find the addresses of dead peers (pytorch issue
    135712); its count of restarts may differ between nodes. So the first rank draws a word and hands it to whoever
    greets it; a greeting left over from an earlier attempt is answered in vain. Raises TimeoutError.
    """
    deadline, own = time.monotonic() + timeout.total_seconds(), uuid.uuid4().hex
    if rank > 0:
        store.set(f"greeting/{rank}", own)
        while (answer := _peek(store, f"answer/{rank}")).partition(" ")[0] != own:
            _pause(deadline, "the first rank")
        word = answer.partition(" ")[2]
        store.set(f"joined/{rank}", word)
        return word
    for peer in range(1, world):
        answered = ""
        while _peek(store, f"joined/{peer}") != own:
            greeting = _peek(store, f"greeting/{peer}")
            if greeting != answered:
                store.set(f"answer/{peer}", f"{greeting} {own}")
                answered = greeting
            _pause(deadline, f"rank {peer}")
    return own


def _peek(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{whom} did not join the run in time")
    time.sleep(0.02)
