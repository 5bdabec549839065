"""Do the ranks still hold the same weights, bit for bit? A processor or a link that computes wrongly shows here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


@torch.no_grad()
def parameter_hash(tensor: torch.Tensor) -> torch.Tensor:
    """0-dim int64 hash of a tensor's bits, computed where the tensor lives.

    Every element's bits are multiplied by an odd number of their own and summed modulo 2^64: exact and the same on
    every device, and any single changed element changes the sum.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start, start + chunk.numel(), device=tensor.device)
        total += (chunk * (place * 0x5851F42D4C957F2D * 2 + 1)).sum()
    return total


def hash_parameters(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Hash by name. One transfer to the host for all of them."""
    hashes = {name: parameter_hash(tensor) for name, tensor in named}
    values = torch.stack(list(hashes.values())).tolist() if hashes else []
    return dict(zip(hashes, values, strict=True))


@dataclass(frozen=True)
class Divergence:
    """Ranks whose weights differ from those of most ranks."""

    ranks: list[int]
    parameters: list[str]

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        more = f" and {len(self.parameters) - 1} more" if len(self.parameters) > 1 else ""
        subject = f"ranks {ranks} differ" if len(self.ranks) > 1 else f"rank {ranks} differs"
        return f"{subject} in {self.parameters[0]}{more}"


def find_divergence(hashes: list[dict[str, int]]) -> Divergence | None:
    """Compare the hashes of all ranks, in rank order (``ranks.on_all(lambda: hash_parameters(...))``).

    Returns None when all agree. Where no majority exists, the rank that comes first counts as right.
    """
    wrong: set[int] = set()
    parameters = []
    for name in hashes[0]:
        values = [rank.get(name) for rank in hashes]
        right, _ = Counter(values).most_common(1)[0]
        differing = {rank for rank, value in enumerate(values) if value != right}
        if differing:
            parameters.append(name)
            wrong |= differing
    return Divergence(sorted(wrong), parameters) if wrong else None
