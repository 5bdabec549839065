"""Row shards of matrices become whole matrices on their owners, and their updates go back.

One all-to-all each way for all matrices of a shape. Rows are sent as they are, uneven or none: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from cognica_poe.training.parallel.ranks import Pending, Ranks
from cognica_poe.training.parallel.sharding import row_range


class StackExchange:
    """The matrices of one shape ``[rows, cols]`` that are stepped together.

    Args:
        shape: their global shape.
        names: the matrices, in the same order on every rank.
        owners: owner rank by name.
        ranks: this process among the others.
    """

    def __init__(self, shape: Sequence[int], names: Sequence[str], owners: Mapping[str, int], ranks: Ranks):
        self.rows, self.cols, self.ranks = shape[0], shape[1], ranks
        self.ranges = [row_range(self.rows, rank, ranks.world) for rank in range(ranks.world)]
        self.heights = [last - first for first, last in self.ranges]
        self.owned = [[name for name in names if owners[name] == rank] for rank in range(ranks.world)]
        self.mine = self.owned[ranks.rank]
        own_rows = self.heights[ranks.rank]
        self.outwards = [len(owned) * own_rows * self.cols for owned in self.owned]
        """Elements from this rank to each owner: its rows of their matrices."""
        self.inwards = [len(self.mine) * height * self.cols for height in self.heights]
        """Elements to this owner from each rank: their rows of its matrices."""

    def to_owners(self, shards: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Pending]:
        """Start sending this rank's rows ``[height, cols]``; ``stack`` makes matrices of what arrives."""
        parts = [shards[name].reshape(-1) for owned in self.owned for name in owned]
        return self._exchange(torch.cat(parts), self.outwards, self.inwards)

    def stack(self, arrived: torch.Tensor) -> torch.Tensor:
        """The owned matrices ``[M, rows, cols]``, in the order of ``mine``."""
        parts = torch.split(arrived, self.inwards)
        shapes = [(len(self.mine), height, self.cols) for height in self.heights]
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim=1)

    def to_shards(self, stack: torch.Tensor) -> tuple[torch.Tensor, Pending]:
        """Start sending the rows of owned matrices ``[M, rows, cols]`` back to their ranks."""
        parts = [stack[:, first:last].reshape(-1) for first, last in self.ranges]
        return self._exchange(torch.cat(parts), self.inwards, self.outwards)

    def shards(self, arrived: torch.Tensor) -> dict[str, torch.Tensor]:
        """This rank's rows ``[height, cols]`` of every matrix."""
        names = [name for owned in self.owned for name in owned]
        return dict(zip(names, arrived.view(len(names), self.heights[self.ranks.rank], self.cols), strict=True))

    def _exchange(self, buffer: torch.Tensor, sent: list[int], received: list[int]) -> tuple[torch.Tensor, Pending]:
        out = torch.empty(sum(received), dtype=buffer.dtype, device=buffer.device)
        return out, self.ranks.all_to_all(out, received, buffer, sent)
