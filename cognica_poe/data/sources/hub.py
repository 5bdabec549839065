"""A dataset of the Hugging Face Hub, streamed through ``datasets`` at a pinned revision."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from cognica_poe.data.documents import Document
from cognica_poe.data.mixes import Source
from cognica_poe.errors import UserError

_SHUFFLE_BUFFER = 1000
_SPEAKERS = {"human": "user", "gpt": "assistant"}


def read_source(source: Source, max_bytes: int, seed: int, drop: Callable[[str], None]) -> Iterator[Document]:
    """Stream a source in a seeded order until ``max_bytes`` of text. Needs ``cognica-poe[datasets]`` and a network.

    A document that would go beyond that by more than a tenth is left out, and ``drop`` told the reason.
    """
    part = max_bytes / len(source.configs)
    for number, config in enumerate(source.configs):
        language = source.languages[number if len(source.languages) > 1 else 0]
        reached = 0
        for document in _read_config(source, config, language, seed):
            if reached >= part:
                break
            size = len(document.text.encode("utf-8", "replace"))
            if reached + size > 1.1 * part:
                drop("over max_bytes")
                continue
            reached += size
            yield document


def _read_config(source: Source, config: str, language: str, seed: int) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(
            f"source {source.name} is read with the datasets library, which is not installed: "
            "pip install 'cognica-poe[datasets]'"
        ) from error
    where = f"{source.dataset}@{source.revision}"
    try:
        if source.files is None:
            name = None if config == "default" else config
            rows = load_dataset(source.dataset, name, split=source.split, revision=source.revision, streaming=True)
        else:
            builder = "parquet" if source.files.endswith(".parquet") else "json"
            pattern = f"hf://datasets/{where}/{source.files.format(config=config)}"
            rows = load_dataset(builder, data_files={source.split: pattern}, split=source.split, streaming=True)
        for number, row in enumerate(rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)):
            if source.text_column not in row:
                raise UserError(f"source {source.name}: no column {source.text_column!r} (columns: {', '.join(row)})")
            part = row[source.id_column] if source.id_column else f"{config}-{number}"
            yield Document(as_text(row[source.text_column]), source.name, language, f"{where}#{part}")
    except (OSError, ValueError, RuntimeError) as error:  # connection errors and hub refusals are OSError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read source {source.name} ({where}): {reason}; check the network, the id and your access rights"
        ) from error


def as_text(value: Any) -> str:
    """A text column as it is; a conversation (turns as strings or role/content objects) as ``Role: words`` blocks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return "" if value is None else json.dumps(value, ensure_ascii=False)
    blocks = []
    for number, turn in enumerate(value):
        if isinstance(turn, dict):
            role = str(turn.get("role") or turn.get("from") or "user")
            words = turn.get("content") or turn.get("value") or ""
        else:
            role, words = ("user", "assistant")[number % 2], turn
        blocks.append(f"{_SPEAKERS.get(role, role).capitalize()}: {str(words).strip()}")
    return "\n\n".join(blocks)
