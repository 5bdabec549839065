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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cognica_poe.analysis.conditions import evaluation_mode, one_thread
from cognica_poe.analysis.windows import Batch, batches, document_windows, lay_out_batch

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

_CHUNK_BYTES = 2**20  # of one [positions, V] slice: passes over it stay in the processor's cache
_CHUNK_BYTES_CUDA = 2**27
_DTYPES = (np.float32, np.float32, np.bool_, np.float32)  # of margin, range, agrees and direct in ``Positions``


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
        """K, the number of stages with numbers of their own."""
        return sum(name.startswith("stage") for name in self.nats)


@dataclass
class Positions:
    """What single positions say (N of them) for WAND and routing; K stages, c_k the pool of stages 0..k.

    document [N] int64; margin [K-1, N] fp32: top1 - top2 of the log-probabilities c_k, k < K-1; range [K-1, N] fp32:
    max - min over the vocabulary of ``c_{k+1} - c_k``; agrees [K-1, N] bool: argmax of c_k is the argmax of the full
    pool; direct [K-1, N] fp32: max - min of the full pool minus c_k; stage0_correct, full_correct [N] bool: the top-1
    token is the target.
    """

    document: NDArray[np.int64]
    margin: NDArray[np.float32]
    range: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    direct: NDArray[np.float32]
    stage0_correct: NDArray[np.bool_]
    full_correct: NDArray[np.bool_]


@dataclass
class Measurement:
    """Result of one pass: per-document sums, the first positions in full, and the protocol that was used (tokens)."""

    sums: DocumentSums
    positions: Positions
    window: int
    stride: int
    tokens: int


@dataclass
class PathScores:
    """What single positions say (n of them): nats and correct [n] by path, the others lists over stages of [n]."""

    nats: dict[str, Tensor]
    correct: dict[str, Tensor]
    margin: list[Tensor] = field(default_factory=list)
    range: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    direct: list[Tensor] = field(default_factory=list)


def measure_paths(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_rows: int = 16,
    stride: int | None = None,
    positions: int = 131_072,
    log: Callable[[str], None] = lambda line: None,
) -> Measurement:
    """Measure every path on ``texts`` in one pass.

    Args:
        model: ``all_logits`` and ``config`` are used; its training flag is restored.
        tokenizer: ``encode_batch``, ``bos_id``, ``token_bytes`` [V] are used.
        texts: the validation documents.
        batch_rows: most rows per forward pass; fewer are used where their fp32 logits would exceed 256 MiB.
        stride: new tokens per window; ``None`` is the window length (no overlap).
        positions: how many positions (from the first document on) are kept singly for WAND and routing.
        log: receives progress lines.

    Raises:
        ValueError: a stride outside [1, window], no token at all, or a tokenizer that loses bytes of the text.
    """
    config = model.config
    window: int = config.max_position_embeddings
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} must be between 1 and the window of {window} tokens")
    documents = [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(list(texts))]
    if not any(map(len, documents)):
        raise ValueError("the validation documents hold no token")
    windows = [item for i, ids in enumerate(documents) for item in document_windows(i, len(ids), window, stride)]
    collector = _Collector(documents, _byte_counts(documents, texts, tokenizer.token_bytes), positions)
    paths = 1 if config.poe_mode == "none" else config.num_stages + 1
    device = next(model.parameters()).device
    done, total, next_line = 0, sum(item.stop - item.scored for item in windows), 0.0
    with evaluation_mode(model):
        for rows in batches(windows, batch_rows, 4 * paths * config.vocab_size):
            batch = lay_out_batch(rows, documents, tokenizer.bos_id)
            _measure_batch(model, batch, device, collector)
            done += len(batch.document)
            if done / total >= next_line:
                log(f"evaluated {done:,} of {total:,} tokens")
                next_line = done / total + 0.2
    return Measurement(*collector.result(), window=window, stride=stride, tokens=total)


def _byte_counts(
    documents: Sequence[NDArray[np.int64]], texts: Sequence[str], token_bytes: NDArray[np.int32]
) -> NDArray[np.int64]:
    """True UTF-8 bytes per document, [documents]."""
    counts = np.array([int(token_bytes[ids].sum()) for ids in documents], dtype=np.int64)
    for index, (count, text) in enumerate(zip(counts, texts, strict=True)):
        size = len(text.encode())
        if count != size:
            raise ValueError(f"the tokens of document {index} stand for {count} bytes, its text has {size}")
    return counts


@torch.no_grad()
def _measure_batch(model: CognicaPoEForCausalLM, batch: Batch, device: torch.device, collector: _Collector) -> None:
    """Score every path at the batch's positions, a slice of them at a time."""
    inputs, targets, place = (tensor.to(device) for tensor in (batch.inputs, batch.targets, batch.place))
    stages, plain = model.all_logits(inputs)
    stages = () if model.config.poe_mode == "none" else stages
    size = plain.shape[-1]
    flat = [logits.reshape(-1, size) for logits in (*stages, plain)]
    step = max(1, (_CHUNK_BYTES_CUDA if inputs.is_cuda else _CHUNK_BYTES) // (4 * size))
    with one_thread():
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            logits = [rows.index_select(0, place[part]) for rows in flat]
            scores = score_paths(logits[:-1], logits[-1], targets[part], model.config.poe_alpha)
            collector.add(batch.document[part], scores)


def score_paths(stages: list[Tensor], plain: Tensor, targets: Tensor, alpha: float) -> PathScores:
    """Every path at n positions, from capped fp32 logits: ``stages`` K x [n, V], ``plain`` [n, V]; targets [n] int64.

    No stages means a model trained on the plain path. The tensors of ``stages`` are overwritten.
    """
    out = PathScores({}, {})
    _score(out, "plain", plain, targets)
    if not stages:
        for name in ("full", "stage0", "prefix0"):
            out.nats[name], out.correct[name] = out.nats["plain"], out.correct["plain"]
        return out
    tops, pools = [], []
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
            pools.append(score.clone())
    for pool in pools:
        change = pool.sub_(score)
        out.direct.append(change.amax(-1) - change.amin(-1))
    last = f"prefix{len(stages) - 1}"
    out.nats["full"], out.correct["full"] = out.nats[last], out.correct[last]
    out.agrees = [top == tops[-1] for top in tops[:-1]]
    return out


def _score(out: PathScores, name: str, logits: Tensor, targets: Tensor) -> Tensor:
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

    def __init__(self, documents: list[NDArray[np.int64]], byte_counts: NDArray[np.int64], positions: int) -> None:
        self.bytes = byte_counts
        self.targets = np.array([len(ids) for ids in documents], dtype=np.int64)
        # The longest run of documents, from the first on, that fits; two with tokens at least, for cross-fitting.
        fitting = int(np.searchsorted(np.cumsum(self.targets), positions, side="right"))
        self.kept_documents = max(fitting, int(np.flatnonzero(self.targets)[:2][-1]) + 1)
        self.nats: dict[str, NDArray[np.float64]] = {}
        self.correct: dict[str, NDArray[np.float64]] = {}
        self.kept: list[tuple[NDArray[Any], ...]] = []

    def add(self, owner: NDArray[np.int64], scores: PathScores) -> None:
        count = len(self.targets)
        for sums, values in ((self.nats, scores.nats), (self.correct, scores.correct)):
            for name, value in values.items():
                weights = value.double().cpu().numpy()
                added = np.bincount(owner, weights=weights, minlength=count).astype(np.float64, copy=False)
                sums[name] = sums[name] + added if name in sums else added
        keep = owner < self.kept_documents
        if keep.any():
            kinds = (scores.margin, scores.range, scores.agrees, scores.direct)
            rows = [
                torch.stack(values).cpu().numpy()[:, keep] if values else np.empty((0, int(keep.sum())), dtype)
                for values, dtype in zip(kinds, _DTYPES, strict=True)
            ]
            correct = [scores.correct[name].cpu().numpy()[keep] for name in ("stage0", "full")]
            self.kept.append((owner[keep], *rows, *correct))

    def result(self) -> tuple[DocumentSums, Positions]:
        columns = [np.concatenate(parts, axis=-1) for parts in zip(*self.kept, strict=True)]
        # Batches go by length; restore document order so that results do not depend on the batch size.
        order = np.argsort(columns[0], kind="stable")
        positions = Positions(*(column[..., order] for column in columns))
        return DocumentSums(self.bytes, self.targets, self.nats, self.correct), positions
