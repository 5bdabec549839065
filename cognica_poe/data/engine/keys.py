"""Keys of documents: the few bytes of each that all decisions of a build are taken on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cognica_poe.data.cleaning.minhash import BANDS, band_keys
from cognica_poe.data.documents import Document, text_digest

GIVEN = (None, "train", "val")
"""What a file's name says of the split of its documents, by the number that the keys hold."""
_NUMBERS = ("group", "sample", "shard", "order")


def hash_number(*parts: object) -> int:
    """64 bits of sha256 that depend on the parts alone: what ``unit_hash`` is, before it is a float."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def as_unit(numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    """What ``unit_hash`` gives for the same parts, in [0, 1)."""
    return numbers.astype(np.float64) / 2.0**64


@dataclass
class Keys:
    """Keys of the documents of a task, in their order; about 60 bytes each, near-duplicate keys apart."""

    seed: int
    sources: dict[str, int] = field(default_factory=dict)
    """Name of a source to the number that the keys hold."""
    _digests: list[bytes] = field(default_factory=list)
    _numbers: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in _NUMBERS})
    _sizes: list[int] = field(default_factory=list)
    _sources: list[int] = field(default_factory=list)
    _given: list[int] = field(default_factory=list)
    _bands: list[NDArray[np.uint64]] = field(default_factory=list)

    def add(self, document: Document, size: int, split: str | None, near: bool = False) -> None:
        """Take a document in, of ``size`` bytes, whose file's name states ``split``; ``near``: with its bands."""
        group = document.group_key
        if split is not None:
            group = f"{split}\x1f{group}"  # the same origin may stand in both files
        self._digests.append(text_digest(document.text))
        self._numbers["group"].append(hash_number(self.seed, "validation", group))
        self._numbers["sample"].append(hash_number(self.seed, "sample", group))
        self._numbers["shard"].append(hash_number(self.seed, "shard", document.origin))
        self._numbers["order"].append(hash_number(self.seed, "order", document.origin))
        self._sizes.append(size)
        self._sources.append(self.sources.setdefault(document.source, len(self.sources)))
        self._given.append(GIVEN.index(split))
        if near:
            self._bands.append(band_keys([document.text])[0])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Columns by name, ``[documents]``; ``digest`` uint64 ``[documents, 2]``, the other hashes uint64."""
        digests = np.frombuffer(b"".join(self._digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)
        bands = np.array(self._bands, np.uint64).reshape(-1, BANDS)
        return {
            "digest": digests,
            **{name: np.array(numbers, dtype=np.uint64) for name, numbers in self._numbers.items()},
            "size": np.array(self._sizes, dtype=np.uint32),
            "source": np.array(self._sources, dtype=np.uint16),
            "given": np.array(self._given, dtype=np.uint8),
            **{band_name(band): bands[:, band] for band in range(BANDS)},
        }


def band_name(band: int) -> str:
    """Name of the column of a band's keys, which is empty where near duplicates stay."""
    return f"band{band}"


def write_arrays(file: IO[bytes], arrays: dict[str, NDArray[Any]]) -> None:
    """Write arrays, to be read one by one."""
    np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes a keyword for a flag


def read_array(file: Path, name: str) -> NDArray[Any]:
    """One array of a file; the others are not read."""
    with np.load(file, allow_pickle=False) as arrays:
        found: NDArray[Any] = arrays[name]
        return found
