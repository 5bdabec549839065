"""Bits per byte of a text of the user's own: by every path, beside xz, and beside another model on the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from cognica_poe.analysis.baseline import xz_baseline
from cognica_poe.analysis.bits_per_byte import DocumentSums, measure_paths
from cognica_poe.analysis.bootstrap import Bootstrap, Interval
from cognica_poe.analysis.conditions import evaluation_mode
from cognica_poe.analysis.validation import ValidationSlice, validation_slice
from cognica_poe.errors import UserError

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

_BITS = 1.0 / float(np.log(2))
_LONGEST = 2048  # tokens of a window of another model
_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TextFigure:
    """Bits per byte of one path or model, and its 95 % interval, ``None`` where the text is a single piece."""

    name: str
    bpb: float
    low: float | None
    high: float | None
    accuracy: float | None = None


def text_slice(texts: Sequence[str], max_bytes: int | None = None) -> ValidationSlice:
    """The text as measurements of a run would take it: whole, or a sample; cut at line ends where documents are few.

    Raises UserError for no text, and for one line alone, which has no interval.
    """
    try:
        return validation_slice(texts, max_bytes)
    except UserError as error:
        raise UserError(
            "the text is a single short piece: bits per byte need two pieces or more for an interval"
        ) from error


def measure_text(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    part: ValidationSlice,
    *,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[TextFigure], DocumentSums]:
    """Every path of ``model`` on ``part``, the trained one first, and the sums behind the figures."""
    sums = measure_paths(model, tokenizer, part.texts, positions=0, log=log).sums
    stages = range(sums.stages if model.config.poe_mode != "none" and sums.stages > 1 else 0)
    paths = ["full", *(f"prefix{k}" for k in stages[:-1]), *(f"stage{k}" for k in stages), "plain"]
    found = Bootstrap(len(part.texts), units=part.units, seed=seed).ratios(
        [sums.nats[path] for path in paths], sums.bytes, _BITS
    )
    figures = [
        TextFigure(_named(path), item.value, item.low, item.high, float(sums.correct[path].sum() / sums.targets.sum()))
        for path, item in zip(paths, found, strict=True)
    ]
    return figures, sums


def _named(path: str) -> str:
    if path.startswith("prefix"):
        return f"first {int(path.removeprefix('prefix')) + 1} stages"
    return f"stage {path.removeprefix('stage')}" if path.startswith("stage") else path


def xz_figure(part: ValidationSlice) -> TextFigure:
    """xz at its strongest on the same bytes; it has no interval."""
    return TextFigure("xz -9e", xz_baseline([], part.texts)["xz_bpb"], None, None)


def bits(nats: NDArray[np.float64], part: ValidationSlice, sums: DocumentSums, seed: int = 0) -> Interval:
    """Bits per byte of nats [texts]."""
    return Bootstrap(len(part.texts), units=part.units, seed=seed).ratio(nats, sums.bytes, _BITS)


def difference(
    one: NDArray[np.float64], other: NDArray[np.float64], part: ValidationSlice, sums: DocumentSums, seed: int = 0
) -> Interval:
    """Bits per byte of nats ``one`` [texts] minus ``other``, paired."""
    return Bootstrap(len(part.texts), units=part.units, seed=seed).differences(one, [other], sums.bytes, _BITS)[0]


def other_model(name: str, device: torch.device) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder or the local Hub cache; nothing is fetched and no code of
    it is run. Raises UserError where transformers cannot load it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"no causal language model can be loaded from {name}: {reason}") from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]  # transformers hides the signature


@torch.no_grad()
def other_nats(
    model: Any, tokenizer: Any, texts: Sequence[str], log: Callable[[str], None] = lambda line: None
) -> NDArray[np.float64]:
    """Nats of every text [texts] by another model, each token predicted once: windows of its context that each begin
    with its BOS (or end-of-text token).

    Raises UserError for a tokenizer that has neither token, or does not give a text back: its bits would not be of the
    same bytes.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError("the other model's tokenizer has neither BOS nor EOS: nothing stands before a first token")
    window = min(_LONGEST, getattr(model.config, "max_position_embeddings", None) or _LONGEST)
    found = np.zeros(len(texts))
    with evaluation_mode(model):
        for owner, ids in enumerate(_encoded(tokenizer, texts)):
            rows = [ids[start : start + window] for start in range(0, len(ids), window)]
            size = max(1, _LOGITS_BYTES // (4 * model.config.vocab_size * window))
            for start in range(0, len(rows), size):
                found[owner] += _row_nats(model, rows[start : start + size], first)
            if (owner + 1) % 16 == 0:
                log(f"the other model: {owner + 1} of {len(texts)} texts")
    return found


def _encoded(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise UserError(
                f"the other model's tokenizer does not give text {number} back: its bits are of other bytes"
            )
        yield ids


def _row_nats(model: Any, rows: Sequence[list[int]], first: int) -> float:
    device, longest = next(model.parameters()).device, max(map(len, rows))
    padded = [[first, *row[:-1]] + [first] * (longest - len(row)) for row in rows]
    logits = model(input_ids=torch.tensor(padded, device=device)).logits.float()
    total = 0.0
    for row, scores in zip(rows, logits, strict=True):
        targets = torch.tensor(row, device=device)
        total += float(F.cross_entropy(scores[: len(row)], targets, reduction="none").double().sum())
    return total


def is_release(name: str) -> bool:
    """Whether ``name`` is a folder of a model of ours."""
    config = Path(name) / "config.json"
    return config.is_file() and '"cognica_poe"' in config.read_text(encoding="utf-8", errors="replace")
