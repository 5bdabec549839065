"""Bits per byte of one fixed slice while a model trains: each rank measures its share, and the sum is exact.

The protocol and the batches are those of ``bits_per_byte.measure_paths``, so that a figure is that of a release's
record on the same slice; a batch is measured by one rank alone, and batches are added in one order, so that it does not
depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cognica_poe.analysis.bits_per_byte import PathScores, _byte_counts, _measure_batch
from cognica_poe.analysis.conditions import evaluation_mode
from cognica_poe.analysis.validation import ValidationSlice
from cognica_poe.analysis.windows import batches, document_windows, lay_out_batch

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

Share = dict[int, dict[str, float]]
"""Nats by path of every batch that a rank measured, by the batch's number."""


class FixedSlice:
    """A slice, laid out once.

    Args:
        part: what to measure on.
        tokenizer: as in ``measure_paths``.
        config: of the model: window, number of paths, vocabulary.
        batch_rows: most windows per forward pass.
    """

    def __init__(
        self, part: ValidationSlice, tokenizer: Tokenizer, config: CognicaPoEConfig, batch_rows: int = 16
    ) -> None:
        documents = [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(list(part.texts))]
        self.bytes = int(_byte_counts(documents, part.texts, tokenizer.token_bytes).sum())
        self.tokens = sum(map(len, documents))
        window: int = config.max_position_embeddings
        windows = [item for i, ids in enumerate(documents) for item in document_windows(i, len(ids), window, window)]
        paths = 1 if config.poe_mode == "none" else config.num_stages + 1
        grouped = batches(windows, batch_rows, 4 * paths * config.vocab_size)
        self._batches = [lay_out_batch(rows, documents, tokenizer.bos_id) for rows in grouped]
        self.facts = {"documents": len(part.texts), "bytes": self.bytes, "tokens": self.tokens, "sha256": part.sha256}

    def share(self, model: CognicaPoEForCausalLM, rank: int, world: int) -> Share:
        """What rank ``rank`` of ``world`` measures."""
        found: Share = {}
        device = next(model.parameters()).device
        with evaluation_mode(model):
            for number in range(rank, len(self._batches), world):
                sums = _Sums()
                _measure_batch(model, self._batches[number], device, sums)  # type: ignore[arg-type]  # it adds, too
                found[number] = sums.nats
        return found

    def figures(self, shares: Sequence[Share]) -> dict[str, Any]:
        """Bits per byte by path, from the shares of all ranks: ``full``, ``stage``, ``prefix``, ``plain``."""
        whole = {number: nats for share in shares for number, nats in share.items()}
        paths = whole[0]
        bits = {path: sum(whole[i][path] for i in range(len(self._batches))) / np.log(2) / self.bytes for path in paths}
        stages = sum(path.startswith("stage") for path in paths)
        return {
            "full": float(bits["full"]),
            "stage": [float(bits[f"stage{k}"]) for k in range(stages)],
            "prefix": [float(bits[f"prefix{k}"]) for k in range(stages)],
            "plain": float(bits["plain"]),
        }


class _Sums:
    """Adds up nats by path, in fp64."""

    def __init__(self) -> None:
        self.nats: dict[str, float] = {}

    def add(self, owner: NDArray[np.int64], scores: PathScores) -> None:
        for name, value in scores.nats.items():
            self.nats[name] = self.nats.get(name, 0.0) + float(value.double().sum())
