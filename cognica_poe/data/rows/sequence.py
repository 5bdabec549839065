"""Which rows a run reads in which order: shards of an epoch, rows of a shard; and a shard packed once on a machine."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from filelock import FileLock

from cognica_poe.data.manifest import DataManifest
from cognica_poe.data.rows import packing
from cognica_poe.data.rows.store import PackedRows
from cognica_poe.data.tokenizer import Tokenizer
from cognica_poe.errors import UserError

ORDERS = ("shards", "shuffled")
"""How the shards of epoch 0 follow each other: as in the data folder, or shuffled as those of later epochs."""


@dataclass(frozen=True)
class RowSettings:
    """Everything that decides the rows of a run beside data and tokenizer."""

    seed: int
    row_len: int
    """The context length + 1: inputs are ``row[:-1]``, targets ``row[1:]``."""
    case_aug_prob: float = 0.15
    split: str = "train"
    order: str = "shards"
    """One of ``ORDERS``."""

    def require(self, manifest: DataManifest) -> None:
        """Raise UserError for a split that the data have not, or an unknown order."""
        if self.split not in manifest.splits:
            raise UserError(f"unknown split {self.split!r}; choose one of {', '.join(manifest.splits)}")
        if self.order not in ORDERS:
            raise UserError(f"unknown order {self.order!r}; choose one of {', '.join(ORDERS)}")

    @property
    def case_aug(self) -> float:
        """The probability of another case: only training documents get one."""
        return self.case_aug_prob if self.split == "train" else 0.0

    def fingerprint(self, manifest: DataManifest, tokenizer: Tokenizer, epoch: int, shard: int) -> str:
        """Identity of the rows of a shard in an epoch."""
        return packing.fingerprint_of(
            manifest,
            tokenizer,
            split=self.split,
            epoch=epoch,
            shard=shard,
            seed=self.seed,
            row_len=self.row_len,
            case_aug=self.case_aug,
        )

    def shard_order(self, epoch: int, shards: int) -> list[int]:
        """Numbers of the shards in the order in which an epoch reads them."""
        if self.split != "train" or (epoch == 0 and self.order == "shards"):
            return list(range(shards))
        return _shuffled(self.seed, epoch, shards)

    def row_order(self, epoch: int, shard: int, rows: int) -> np.ndarray:
        """int64 [rows]: the packed rows of a shard in the order in which they are read."""
        if self.split != "train":
            return np.arange(rows)
        bits = packing.random_bits(rows, *packing.shard_key(self.seed, epoch, shard, "rows"))
        return np.argsort(bits, kind="stable")


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, shards: int) -> list[int]:
    bits = packing.random_bits(shards, seed, epoch, "shards")
    return [int(shard) for shard in np.argsort(bits, kind="stable")]


def pack_shard(
    data_dir: Path,
    tokenizer: Tokenizer,
    rows_dir: Path,
    settings: RowSettings,
    epoch: int,
    shard: int,
    log: Callable[[str], None] = lambda line: None,
) -> PackedRows:
    """Pack a shard unless that is done; processes of one machine do not do it twice."""
    Path(rows_dir).mkdir(parents=True, exist_ok=True)
    with _lock(rows_dir, f"{settings.split}-{epoch}-{shard}"):
        return packing.pack(
            data_dir,
            tokenizer,
            rows_dir,
            split=settings.split,
            epoch=epoch,
            shard=shard,
            seed=settings.seed,
            row_len=settings.row_len,
            case_aug_prob=settings.case_aug_prob,
            log=log,
        )


@contextlib.contextmanager
def _lock(rows_dir: Path, name: str) -> Iterator[None]:
    """Alone on this machine: other machines that share the folder pack the same bytes, and wait for nobody."""
    file = Path(rows_dir) / f".{name}.{socket.gethostname()}.lock"
    with FileLock(file):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
