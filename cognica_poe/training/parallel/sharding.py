"""Which rows of which parameter live on which rank, and how they travel together.

Every parameter is cut along its first dimension into ``ceil(rows / world)`` rows per rank; the last ranks hold fewer,
or none. Buckets carry the shards of several parameters in one exchange: ``[world, n]``, one line per rank, short
shards padded with zeros, so that 32,768 rows travel between 12 ranks like 32,772.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch


def rows_per_rank(rows: int, world: int) -> int:
    """Rows of a full shard: ``ceil(rows / world)``."""
    return -(-rows // world)


def row_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """First and last (exclusive) row on ``rank``; empty when there are none left."""
    height = rows_per_rank(rows, world)
    return min(rows, rank * height), min(rows, (rank + 1) * height)


class Bucket:
    """Parameters whose shards travel together.

    Args:
        shapes: global shape by parameter name, at least one dimension each.
        world: number of ranks.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], world: int):
        self.shapes, self.world = dict(shapes), world
        self.places: dict[str, tuple[int, int]] = {}
        """First element and number of elements of a full shard within a rank's line, by name."""
        self.elements = 0
        """Elements of a rank's line, padding included."""
        for name, shape in self.shapes.items():
            if not shape:
                raise ValueError(f"parameter {name} has no dimension to cut along")
            size = rows_per_rank(shape[0], world) * math.prod(shape[1:])
            self.places[name] = (self.elements, size)
            self.elements += size

    def new_lines(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeros ``[world, elements]``."""
        return torch.zeros(self.world, self.elements, dtype=dtype, device=device)

    def put(self, lines: torch.Tensor, name: str, full: torch.Tensor) -> None:
        """Copy a full tensor into its places of ``lines``, casting to its dtype."""
        for view, part in self._pairs(lines, name, full):
            view.copy_(part)

    def get(self, lines: torch.Tensor, name: str, full: torch.Tensor) -> None:
        """Copy from ``lines`` into a full tensor; the opposite of ``put``."""
        for view, part in self._pairs(lines, name, full):
            part.copy_(view)

    def shard(self, line: torch.Tensor, name: str, rank: int) -> torch.Tensor:
        """View of ``rank``'s rows of a parameter in its line ``[elements]``, padding cut off."""
        first, last = row_range(self.shapes[name][0], rank, self.world)
        shape = (last - first, *self.shapes[name][1:])
        start = self.places[name][0]
        return line[start : start + math.prod(shape)].view(shape)

    def _pairs(self, lines: torch.Tensor, name: str, full: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Matching views: the full shards in one piece, then the short one."""
        start, size = self.places[name]
        flat = full.reshape(-1)
        whole = flat.numel() // size if size else 0
        if whole:
            yield lines[:whole, start : start + size], flat[: whole * size].view(whole, size)
        rest = flat.numel() - whole * size
        if rest:
            yield lines[whole, start : start + rest], flat[whole * size :]


def newton_schulz_cost(shape: Sequence[int]) -> int:
    """Multiplications of one Newton-Schulz iteration of a matrix: two products of its Gram matrix, one with itself."""
    short, long = sorted(shape)
    return 2 * short * short * long + short**3


def assign_owners(shapes: Mapping[str, torch.Size], world: int) -> dict[str, int]:
    """Owner rank of every matrix: longest first, each to the rank with the least work so far.

    The same on every rank. Its heaviest rank does at most 4/3 of the least possible work (Graham 1969).
    """
    work = [0] * world
    owners = {}
    for name in sorted(shapes, key=lambda n: (-newton_schulz_cost(shapes[n]), n)):
        owner = min(range(world), key=lambda rank: (work[rank], rank))
        work[owner] += newton_schulz_cost(shapes[name])
        owners[name] = owner
    return owners
