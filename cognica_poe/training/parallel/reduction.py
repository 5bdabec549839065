"""Gradients of every rank, summed into row shards while the backward pass still runs.

A bucket of parameters leaves as soon as the gradients of all its members are complete, in an order that is the same on
every rank; the full gradients are freed at that moment. At most ``IN_FLIGHT`` buckets are under way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from cognica_poe.training.parallel.ranks import Pending, Ranks
from cognica_poe.training.parallel.sharding import Bucket

IN_FLIGHT = 2

GradSync = Literal["every_microbatch", "last_microbatch"]


class GradientReducer:
    """Reduce-scatters the gradients of a model's parameters.

    Args:
        parameters: full parameters by name, the same on every rank.
        sections: parameter names in the order in which a backward pass completes their gradients, with the number of
            times it adds to each (0: never). A section is a bucket.
        ranks: this process among the others.
        grad_sync: ``every_microbatch`` sends after each micro-batch and never keeps a full gradient (ZeRO-2);
            ``last_microbatch`` adds up full gradients and sends once per step: ``1 / micro-batches`` of the traffic
            for the memory of one full gradient.
        dtype: in which gradients travel and are added across ranks.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        sections: Sequence[Mapping[str, int]],
        ranks: Ranks,
        grad_sync: GradSync,
        dtype: torch.dtype,
    ):
        self.parameters, self.ranks, self.grad_sync, self.dtype = dict(parameters), ranks, grad_sync, dtype
        self.arrange(sections)
        self.names = list(self.parameters)
        self.sums: dict[str, torch.Tensor] = {}
        self.present: set[str] = set()
        self.pending: list[tuple[Bucket, torch.Tensor, Pending]] = []
        self.sending, self.next = False, len(self.buckets)
        self.waiting: dict[str, int] = {}
        for name, parameter in self.parameters.items():
            hook = partial(self._arrived, name)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch's

    def arrange(self, sections: Sequence[Mapping[str, int]]) -> None:
        """Take another order of the gradients. Raises ValueError when it names other parameters."""
        self.arrivals = {name: count for section in sections for name, count in section.items()}
        if self.arrivals.keys() != self.parameters.keys():
            odd = sorted(self.arrivals.keys() ^ self.parameters.keys())
            raise ValueError(f"sections and parameters differ: {', '.join(odd)}")
        self.buckets = [
            Bucket({name: self.parameters[name].shape for name in section}, self.ranks.world)
            for section in sections
            if any(section.values())
        ]

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients that arrive inside are sent on, or kept until the last micro-batch of the step."""
        self.sending = last or self.grad_sync == "every_microbatch"
        self.waiting, self.next = dict(self.arrivals), 0
        yield
        while self.sending and self.next < len(self.buckets):  # members without a gradient in this pass
            self._send()
        self.sending = False

    def collect(self) -> dict[str, torch.Tensor]:
        """Summed gradient rows of this rank ``[rows, ...]`` by name, of all parameters that any rank had one for.

        A rank without a gradient counts as zero where others have one. Frees everything for the next step.
        """
        while self.pending:
            self._receive()
        anywhere = self.ranks.any([name in self.present for name in self.names])
        sums = {name: self.sums[name] for name, found in zip(self.names, anywhere, strict=True) if found}
        self.drop()
        return sums

    def drop(self) -> None:
        """Forget all gradients."""
        while self.pending:
            self._receive()
        self.sums, self.present = {}, set()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _arrived(self, name: str, parameter: nn.Parameter) -> None:
        if not self.sending:
            return
        self.waiting[name] -= 1
        if self.waiting[name] < 0:
            raise RuntimeError(f"{name} received more gradients in a pass than the {self.arrivals[name]} declared")
        while self.next < len(self.buckets) and not any(self.waiting[n] for n in self.buckets[self.next].places):
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self.buckets[self.next]
        self.next += 1
        if len(self.pending) == IN_FLIGHT:
            self._receive()
        device = self.parameters[next(iter(bucket.places))].device
        lines = bucket.new_lines(self.dtype, device)
        for name in bucket.places:
            gradient = self.parameters[name].grad
            if gradient is not None:
                bucket.put(lines, name, gradient)
                self.parameters[name].grad = None
                self.present.add(name)
        line = torch.empty(bucket.elements, dtype=self.dtype, device=device)
        self.pending.append((bucket, line, self.ranks.reduce_scatter(line, lines)))

    @torch.no_grad()
    def _receive(self) -> None:
        bucket, line, pending = self.pending.pop(0)
        pending.wait()
        for name in bucket.places:
            rows = bucket.shard(line, name, self.ranks.rank)
            if name in self.sums:
                self.sums[name] += rows
            else:
                self.sums[name] = rows.to(torch.promote_types(self.dtype, torch.float32))
