"""Log-probabilities of continuations and of whole texts by one path of a model: what benchmarks of tasks ask for.

The protocol is that of ``bits_per_byte``: every row begins with BOS, once. A context that does not fit loses its
beginning, never its BOS, and a text longer than the context is cut into windows that each begin with BOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cognica_poe.analysis.conditions import evaluation_mode
from cognica_poe.errors import UserError

if TYPE_CHECKING:
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Path:
    """Which use of the weights answers: all stages, the first ``count`` of them, or one, counted from 0."""

    kind: Literal["full", "prefix", "stage"] = "full"
    count: int | None = None

    def __str__(self) -> str:
        return self.kind if self.count is None else f"{self.kind} {self.count}"


@dataclass(frozen=True)
class Scored:
    """A continuation: sum of its natural log-probabilities, and whether each of its tokens is the most probable."""

    logprob: float
    greedy: bool


class Scorer:
    """Scores token ids by one path. Raises UserError for a path that the model does not have."""

    def __init__(self, model: CognicaPoEForCausalLM, bos: int, path: Path = Path()) -> None:
        self.model, self.bos, self.path = model, bos, path
        stages, plain = model.config.num_stages, model.config.poe_mode == "none"
        if path.kind != "full" and plain:
            raise UserError(f"path {path}: a model trained on the plain path (poe_mode none) has the path full alone")
        low, high = (1, stages) if path.kind == "prefix" else (0, stages - 1)
        if path.count is not None and not low <= path.count <= high:
            raise UserError(f"path {path}: the model has {stages} stages, so that {low} to {high} may be asked for")

    @property
    def window(self) -> int:
        """Most tokens of a row, BOS among them."""
        size: int = self.model.config.max_position_embeddings
        return size

    def logprobs(self, ids: Tensor) -> Tensor:
        """Log-probabilities [B, T, V] behind every token of ids [B, T]."""
        if self.model.config.poe_mode == "none":
            return self.model(input_ids=ids, use_cache=False).logits.log_softmax(dim=-1)  # type: ignore[no-any-return]
        if self.path.kind == "stage":
            return self.model.forward_stage(ids, self.path.count or 0).log_softmax(dim=-1)
        return self.model.forward_aggregated(ids, self.path.count)

    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """Of every (context, continuation), ids without BOS; the context may be empty.

        Raises UserError for a continuation longer than the context of the model.
        """
        rows: list[tuple[list[int], int]] = []
        for context, continuation in pairs:
            if not 0 < len(continuation) <= self.window:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: the model's context has "
                    f"{self.window}, and an empty one says nothing"
                )
            kept = list(context)[max(0, len(context) + len(continuation) - self.window) :]
            rows.append(([self.bos, *kept, *continuation], len(continuation)))
        found = [Scored(0.0, True)] * len(rows)
        for places in self._batches([len(row) - 1 for row, _ in rows]):
            for place, scored in zip(places, self._score([rows[place] for place in places]), strict=True):
                found[place] = scored
        return found

    def rolling(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability of every text (ids without BOS), each token predicted once, windows as ``bits_per_byte``."""
        pieces = [(owner, ids[start : start + self.window])
                  for owner, ids in enumerate(texts) for start in range(0, len(ids), self.window)]  # fmt: skip
        totals = [0.0] * len(texts)
        for (owner, _), scored in zip(pieces, self.continuations([([], piece) for _, piece in pieces]), strict=True):
            totals[owner] += scored.logprob
        return totals

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Places of rows of similar length, longest first, whose logits stay within 256 MiB."""
        order, start = sorted(range(len(lengths)), key=lambda place: -lengths[place]), 0
        width = 4 * self.model.config.vocab_size * max(1, self.model.config.num_stages)
        while start < len(order):
            size = max(1, _LOGITS_BYTES // (width * lengths[order[start]]))
            yield order[start : start + size]
            start += size

    @torch.no_grad()
    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[Scored]:
        device, longest = next(self.model.parameters()).device, max(len(row) for row, _ in rows) - 1
        padded = [row[:-1] + [self.bos] * (longest - len(row) + 1) for row, _ in rows]  # read by nothing before it
        with evaluation_mode(self.model):
            scores = self.logprobs(torch.tensor(padded, device=device))
        found = []
        for (row, count), score in zip(rows, scores, strict=True):
            targets = torch.tensor(row[-count:], device=device)
            part = score[len(row) - 1 - count : len(row) - 1]
            chosen = part.gather(1, targets[:, None]).double().sum()
            found.append(Scored(float(chosen), bool((part.argmax(dim=-1) == targets).all())))
        return found
