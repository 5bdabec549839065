"""What a tokenizer makes of a data folder, by source and language: bytes per token, words, round trips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cognica_poe.data.cleaning.words import word_hashes
from cognica_poe.data.documents import Document
from cognica_poe.data.mixes import Mix
from cognica_poe.data.tokenizer import Tokenizer
from cognica_poe.errors import UserError
from cognica_poe.files import read_json

_BATCH = 64  # documents encoded at once, by all threads


@dataclass
class Tally:
    """Counts of the documents of one source and language."""

    source: str
    language: str
    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of text."""
    words: int = 0
    """As ``data.cleaning.words`` has them: punctuation is none, a Chinese character is one."""
    tokens: int = 0
    changed: int = 0
    """Documents that encoding and decoding change."""
    uses: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64), repr=False)
    """int64 [V]: how often every token occurs."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token; 0 without a token."""
        return self.bytes / self.tokens if self.tokens else 0.0

    @property
    def fertility(self) -> float:
        """Tokens per word; 0 without a word."""
        return self.tokens / self.words if self.words else 0.0

    @property
    def byte_tokens(self) -> float:
        """Share of the tokens that are a single byte: text for which no merge was learned; 0 without a token."""
        return float(self.uses[:256].sum() / self.tokens) if self.tokens else 0.0


def measure(documents: Iterable[Document], tokenizer: Tokenizer, max_bytes: int, threads: int = 1) -> list[Tally]:
    """Tallies of every source and language in ``documents``, up to ``max_bytes`` of text, largest first."""
    found: dict[tuple[str, str], Tally] = {}
    chosen = _capped(documents, max_bytes)
    while batch := list(islice(chosen, _BATCH)):
        for document, ids in zip(batch, tokenizer.encode_batch([each.text for each in batch], threads), strict=True):
            key = document.source, document.language
            tally = found.setdefault(key, Tally(*key, uses=np.zeros(tokenizer.vocab_size, np.int64)))
            tally.documents += 1
            tally.bytes += len(document.text.encode())
            tally.words += len(word_hashes(document.text))
            tally.tokens += len(ids)
            tally.uses += np.bincount(ids, minlength=tokenizer.vocab_size)
            tally.changed += tokenizer.decode(ids) != document.text
    return sorted(found.values(), key=lambda tally: (-tally.bytes, tally.source, tally.language))


def _capped(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    left = max_bytes
    for document in documents:
        if left <= 0:
            return
        yield document
        left -= len(document.text.encode())


def summary(tallies: list[Tally], tokenizer: Tokenizer) -> dict[str, Any]:
    """What was measured as JSON values: ``vocab_size``, ``tokenizer`` (sha256), ``unused`` (ids that occur nowhere, but
    for special tokens), and lists ``rows`` and ``sources``, all languages of each together."""
    uses = sum((tally.uses for tally in tallies), np.zeros(tokenizer.vocab_size, np.int64))
    special = set(tokenizer.special_ids.values())
    total = max(1, sum(tally.tokens for tally in tallies))
    by_source: dict[str, list[Tally]] = defaultdict(list)
    for tally in tallies:
        by_source[tally.source].append(tally)
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.sha256,
        "unused": [index for index in np.flatnonzero(uses == 0).tolist() if index not in special],
        "sources": [_figures(_together(name, parts), total) for name, parts in by_source.items()],
        "rows": [_figures(tally, total) for tally in tallies],
    }


def _together(source: str, parts: list[Tally]) -> Tally:
    names = ("documents", "bytes", "words", "tokens", "changed")
    sums = {name: sum(getattr(part, name) for part in parts) for name in names}
    languages = ", ".join(sorted(part.language for part in parts))
    return Tally(source, languages, **sums, uses=sum(part.uses for part in parts))  # type: ignore[arg-type]


def _figures(tally: Tally, total: int) -> dict[str, Any]:
    counts = {name: value for name, value in asdict(replace(tally, uses=tally.uses[:0])).items() if name != "uses"}
    return {
        **counts,
        "share_of_tokens": tally.tokens / total,
        "bytes_per_token": tally.bytes_per_token,
        "fertility": tally.fertility,
        "byte_tokens": tally.byte_tokens,
        "tokens_used": int((tally.uses > 0).sum()),
    }


def with_measured(mix: Mix, report: Path) -> Mix:
    """``mix`` with the bytes per token that a report (:func:`summary`) has for its sources.

    Raises UserError for a file that is no such report, or lacks a source.
    """
    said = read_json(report, "token report")
    try:
        measured = {row["source"]: float(row["bytes_per_token"]) for row in said["sources"]}
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{report} is no report of tokens; `tokenizer report --json` prints one") from error
    if missing := [source.name for source in mix.sources if not measured.get(source.name, 0) > 0]:
        raise UserError(f"token report {report} has no bytes per token of {', '.join(missing)}")
    sources = (replace(source, bytes_per_token=round(measured[source.name], 4)) for source in mix.sources)
    return replace(mix, sources=tuple(sources))


def plot(summary: dict[str, Any], file: Path) -> None:
    """Draw bytes per token and tokens per word of every source and language into ``file``, by its ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = summary["rows"][::-1]
    figure = Figure(figsize=(9, 1 + 0.32 * max(3, len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    labels = [f"{row['source']} ({row['language']})" for row in rows]
    for axes, name, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("bytes_per_token", "fertility"),
        ("bytes of text per token", "tokens per word"),
        strict=True,
    ):
        bars = axes.barh(labels, [row[name] for row in rows], color="#4477aa")
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
    figure.savefig(file)
