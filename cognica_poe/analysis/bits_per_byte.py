"""Bits per byte and next-token accuracy of every path of a model, in one pass over the validation documents.

Protocol. A document is its tokens without any special token; its UTF-8 bytes are the denominator. It is cut into
windows of ``config.max_position_embeddings`` targets; every window is fed as BOS followed by its tokens except the last
(the form of a training row), so that each token of a document is predicted exactly once. With ``stride`` below the
window the windows overlap and only tokens that no earlier window predicted are scored; the default does not overlap.
BOS itself is never a target.

``BPB = sum(nats) / ln 2 / sum(bytes)`` (nanochat, ``evaluate_bpb``), summed in fp64 over documents.

Two paths exist and are never mixed: the *pool* of the stage heads, and the *plain* path (last layer,
backout, shared head only). "full" is the one that the model was trained on.

Softmax of a mean of log-probabilities equals softmax of the mean of the logits (a constant per position cancels), for
any ``alpha``; hence pools are formed as running means of the capped logits, and normalised once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cognica_poe.analysis.threads import one_thread

_LOGITS_BYTES = 256 * 2**20  # of fp32 logits [rows, T, V] of all paths of one batch
_CHUNK_BYTES = 2**20  # of one [positions, V] slice: passes over it stay in the processor's cache
_CHUNK_BYTES_CUDA = 2**27


def _silent(line: str) -> None:
    """Drop a progress line."""


@dataclass(frozen=True)
class Window:
    """Tokens ``[start, stop)`` of a document, fed after BOS; those from ``scored`` on are scored."""

    document: int
    start: int
    stop: int
    scored: int


@dataclass
class DocumentSums:
    """Per-document sums, all arrays [documents]: what bootstrap intervals and paired deltas are computed from.

    ``nats`` and ``correct`` are keyed by path: ``full``, ``plain``, ``stage0`` .., ``prefix0`` .. (prefix k pools the
    stages 0..k). Models trained on the plain path have the one stage ``stage0``, which is the plain path itself.
    """

    bytes: NDArray[np.int64]
    targets: NDArray[np.int64]
    nats: dict[str, NDArray[np.float64]]
    correct: dict[str, NDArray[np.float64]]

    @property
    def stages(self) -> int:
        """K, the number of stages with figures of their own."""
        return sum(name.startswith("stage") for name in self.nats)

    def bpb(self, path: str) -> float:
        """Bits per UTF-8 byte of a path."""
        return float(self.nats[path].sum() / np.log(2) / self.bytes.sum())

    def accuracy(self, path: str) -> float:
        """Share of targets that are the path's top-1 token."""
        return float(self.correct[path].sum() / self.targets.sum())


@dataclass
class Positions:
    """Figures of single positions (N of them) for WAND and routing; K stages, c_k the pool of stages 0..k.

    document [N] int64; margin [K-1, N] fp32: top1 - top2 of the log-probabilities c_k, k < K-1; range [K-1, N] fp32:
    max - min over the vocabulary of ``c_{k+1} - c_k``; agrees [K-1, N] bool: argmax of c_k is the argmax of the full
    pool; stage0_correct, full_correct [N] bool: the top-1 token is the target.
    """

    document: NDArray[np.int64]
    margin: NDArray[np.float32]
    range: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    stage0_correct: NDArray[np.bool_]
    full_correct: NDArray[np.bool_]


@dataclass
class Evaluation:
    """Result of one pass: per-document sums, the first positions in full, and the protocol that was used."""

    sums: DocumentSums
    positions: Positions
    window: int
    stride: int
    tokens: int


@dataclass
class _Chunk:
    """Figures of n positions as they come out of the maths below; lists over stages."""

    nats: dict[str, Tensor]
    correct: dict[str, Tensor]
    margin: list[Tensor] = field(default_factory=list)
    range: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)


def document_windows(document: int, tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Windows of a document of ``tokens`` tokens; every token is scored in exactly one of them."""
    start = scored = 0
    while scored < tokens:
        stop = min(start + window, tokens)
        yield Window(document, start, stop, scored)
        start, scored = start + stride, stop


def evaluate(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    *,
    batch_rows: int = 16,
    stride: int | None = None,
    positions: int = 131_072,
    log: Callable[[str], None] = _silent,
) -> Evaluation:
    """Measure every path on ``texts`` in one pass.

    Args:
        model: a CognicaPoEForCausalLM (``all_logits`` and ``config`` are used); its training flag is restored.
        tokenizer: ``encode_batch``, ``bos_id``, ``token_bytes`` [V].
        texts: the validation documents.
        batch_rows: most rows per forward pass; fewer are used where their fp32 logits would exceed 256 MiB.
        stride: new tokens per window; ``None`` is the window length (no overlap).
        positions: how many positions (from the first document on) are kept singly for WAND and routing.
        log: receives progress lines.

    Raises:
        ValueError: a stride outside [1, window], no token at all, or a tokenizer that loses bytes of the text.
    """
    config = model.config
    window = config.max_position_embeddings
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must be between 1 and the window of {window} tokens")
    documents = [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(list(texts))]
    if not any(map(len, documents)):
        raise ValueError("the validation documents hold no token")
    plan = [item for index, ids in enumerate(documents) for item in document_windows(index, len(ids), window, stride)]
    collector = _Collector(documents, _byte_counts(documents, texts, tokenizer.token_bytes), positions)
    paths = 1 if config.poe_mode == "none" else config.num_stages + 1
    row_bytes = 4 * paths * config.vocab_size
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        done, total, next_line = 0, sum(item.stop - item.scored for item in plan), 0.0
        for rows in _batches(plan, batch_rows, row_bytes):
            inputs, targets, owner, place = _batch_arrays(rows, documents, tokenizer.bos_id)
            _measure_batch(model, inputs.to(device), targets.to(device), owner, place, collector)
            done += len(owner)
            if done / total >= next_line:
                log(f"evaluated {done:,} of {total:,} tokens")
                next_line = done / total + 0.2
    finally:
        model.train(was_training)
    return Evaluation(*collector.result(), window=window, stride=stride, tokens=total)


def _byte_counts(documents: list[NDArray], texts: Sequence[str], token_bytes: NDArray) -> NDArray[np.int64]:
    """True UTF-8 bytes per document, [documents]."""
    counts = np.array([int(token_bytes[ids].sum()) for ids in documents], dtype=np.int64)
    for index, (count, text) in enumerate(zip(counts, texts, strict=True)):
        size = len(text.encode())
        if count != size:
            raise ValueError(f"the tokens of document {index} stand for {count} bytes, its text has {size}")
    return counts


def _batches(plan: Iterable[Window], batch_rows: int, row_bytes: int) -> Iterator[list[Window]]:
    """Group windows of similar length, longest first, within the row and memory limits."""
    rows: list[Window] = []
    limit = 0
    for item in sorted(plan, key=lambda item: (item.start - item.stop, item.document, item.start)):
        if rows and len(rows) >= limit:
            yield rows
            rows = []
        if not rows:
            limit = max(1, min(batch_rows, _LOGITS_BYTES // (row_bytes * (item.stop - item.start))))
        rows.append(item)
    if rows:
        yield rows


def _batch_arrays(
    rows: list[Window], documents: list[NDArray], bos: int
) -> tuple[Tensor, Tensor, NDArray[np.int64], Tensor]:
    """Inputs [B, T] (right padding: later positions cannot reach earlier ones), and of the n scored positions the
    targets [n], the documents [n], and the places [n] in the flattened [B * T]."""
    length = max(item.stop - item.start for item in rows)
    inputs = np.full((len(rows), length), bos, dtype=np.int64)
    targets, owner, place = [], [], []
    for row, item in enumerate(rows):
        ids = documents[item.document][item.start : item.stop]
        inputs[row, 1 : len(ids)] = ids[:-1]
        first = item.scored - item.start
        targets.append(ids[first:])
        owner.append(np.full(len(ids) - first, item.document))
        place.append(row * length + np.arange(first, len(ids)))
    return (
        torch.from_numpy(inputs),
        torch.from_numpy(np.concatenate(targets)),
        np.concatenate(owner),
        torch.from_numpy(np.concatenate(place)),
    )


@torch.no_grad()
def _measure_batch(
    model, inputs: Tensor, targets: Tensor, owner: NDArray, place: Tensor, collector: _Collector
) -> None:
    stages, plain = model.all_logits(inputs)
    stages = () if model.config.poe_mode == "none" else stages
    size = plain.shape[-1]
    flat = [logits.reshape(-1, size) for logits in (*stages, plain)]
    place = place.to(inputs.device)
    step = max(1, (_CHUNK_BYTES_CUDA if inputs.is_cuda else _CHUNK_BYTES) // (4 * size))
    with one_thread():
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            logits = [rows.index_select(0, place[part]) for rows in flat]
            collector.add(owner[part], measure_paths(logits[:-1], logits[-1], targets[part], model.config.poe_alpha))


def measure_paths(stages: list[Tensor], plain: Tensor, targets: Tensor, alpha: float) -> _Chunk:
    """Figures of n positions from capped fp32 logits: ``stages`` K x [n, V], ``plain`` [n, V]; targets [n] int64.

    No stages means a model trained on the plain path. The tensors of ``stages`` are overwritten.
    """
    out = _Chunk({}, {})
    _score(out, "plain", plain, targets)
    if not stages:
        for name in ("full", "stage0", "prefix0"):
            out.nats[name], out.correct[name] = out.nats["plain"], out.correct["plain"]
        return out
    tops = []
    mean = stages[0].clone()
    for k, logits in enumerate(stages):
        top = _score(out, f"stage{k}", logits, targets)
        scale = (k + 1.0) ** alpha
        if k == 0:  # a pool of one is the stage itself, whatever alpha
            out.nats["prefix0"], out.correct["prefix0"] = out.nats["stage0"], out.correct["stage0"]
            score = mean
        else:
            change = logits.sub_(mean).div_(k + 1.0)  # of the running mean
            if alpha == 0.0:
                mean.add_(change)
                score = mean
            else:
                before = mean * k**alpha
                mean.add_(change)
                score = mean * scale
                change = score - before
            out.range.append(change.amax(-1) - change.amin(-1))
            top = _score(out, f"prefix{k}", score, targets)
        tops.append(top)
        if k < len(stages) - 1:
            out.margin.append(_margin(score, top))
    last = f"prefix{len(stages) - 1}"
    out.nats["full"], out.correct["full"] = out.nats[last], out.correct[last]
    out.agrees = [top == tops[-1] for top in tops[:-1]]
    return out


def _score(out: _Chunk, name: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Store nats and correctness of logits [n, V] under ``name``; return the top-1 tokens [n]."""
    top = _argmax(logits)
    peak = logits.gather(-1, top[:, None])
    normaliser = (logits - peak).exp_().sum(-1).log_().add_(peak[:, 0])
    out.nats[name] = normaliser - logits.gather(-1, targets[:, None])[:, 0]
    out.correct[name] = top == targets
    return top


def _margin(score: Tensor, top: Tensor) -> Tensor:
    """Top-1 minus top-2 along the last axis, [n]; ``score`` is restored."""
    index = top[:, None]
    first = score.gather(-1, index)
    second = score.scatter_(-1, index, -torch.inf).amax(-1)
    score.scatter_(-1, index, first)
    return first[:, 0] - second


def _argmax(logits: Tensor) -> Tensor:
    # NumPy's argmax is vectorised, torch's is not on the CPU (0.1 against 1.0 ns per element).
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


class _Collector:
    """Adds up per-document sums and keeps the first positions."""

    def __init__(self, documents: list[NDArray], byte_counts: NDArray[np.int64], positions: int) -> None:
        self.bytes = byte_counts
        self.targets = np.array([len(ids) for ids in documents], dtype=np.int64)
        # The longest run of documents, from the first on, that fits; two with tokens at least, for cross-fitting.
        fitting = int(np.searchsorted(np.cumsum(self.targets), positions, side="right"))
        self.kept_documents = max(fitting, int(np.flatnonzero(self.targets)[:2][-1]) + 1)
        self.nats: dict[str, NDArray[np.float64]] = {}
        self.correct: dict[str, NDArray[np.float64]] = {}
        self.kept: list[tuple[NDArray, ...]] = []

    def add(self, owner: NDArray[np.int64], chunk: _Chunk) -> None:
        count = len(self.targets)
        for sums, values in ((self.nats, chunk.nats), (self.correct, chunk.correct)):
            for name, value in values.items():
                weights = value.double().cpu().numpy()
                sums[name] = sums.get(name, 0.0) + np.bincount(owner, weights=weights, minlength=count)
        keep = owner < self.kept_documents
        if keep.any():
            rows = [
                torch.stack(values).cpu().numpy()[:, keep] if values else np.empty((0, int(keep.sum())), dtype)
                for values, dtype in ((chunk.margin, np.float32), (chunk.range, np.float32), (chunk.agrees, np.bool_))
            ]
            correct = [chunk.correct[name].cpu().numpy()[keep] for name in ("stage0", "full")]
            self.kept.append((owner[keep], *rows, *correct))

    def result(self) -> tuple[DocumentSums, Positions]:
        columns = [np.concatenate(parts, axis=-1) for parts in zip(*self.kept, strict=True)]
        # Batches go by length; restore document order so that results do not depend on the batch size.
        order = np.argsort(columns[0], kind="stable")
        positions = Positions(*(column[..., order] for column in columns))
        return DocumentSums(self.bytes, self.targets, self.nats, self.correct), positions
