"""Sources and mixes on the Hugging Face Hub, read through ``datasets`` at a pinned revision."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cognica_poe.data.documents import Document
from cognica_poe.errors import UserError
from cognica_poe.files import read_json, write_json

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHUFFLE_BUFFER = 1000
_SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Source:
    """One source of a mix."""

    name: str
    """Name in the mix, kept in every document."""
    dataset: str
    """Hub dataset id."""
    share: float
    """Part of the mix's bytes, between 0 and 1."""
    licence: str
    """Licence that the dataset states."""
    revision: str | None = None
    """Commit of the dataset, 40 hex digits. Must be filled in before the source is read."""
    configs: tuple[str, ...] = ("default",)
    """Configurations, read one after another in equal parts."""
    languages: tuple[str, ...] = ("en",)
    """One per configuration, or one for all: ISO 639-1, or ``code``."""
    split: str = "train"
    text_column: str = "text"
    """Holds the text; a list of turns is joined into one text."""
    id_column: str | None = None
    """Names the document in its origin; the row number where None."""
    files: str | None = None
    """Pattern of data files, for datasets that come with a loading script (which ``datasets`` no longer runs)."""


@dataclass(frozen=True)
class Mix:
    """A named list of sources whose shares add up to one."""

    name: str
    sources: tuple[Source, ...]


def unpinned(mix: Mix) -> list[str]:
    """Names of the sources whose revision is no full commit hash."""
    return [source.name for source in mix.sources if not _COMMIT.fullmatch(source.revision or "")]


def require_pinned(mix: Mix) -> None:
    """Raise UserError unless every source names a commit."""
    if missing := unpinned(mix):
        raise UserError(
            f"mix {mix.name} has no pinned revision for: {', '.join(missing)}; save it with save_mix, "
            'fill in each "revision" (40 hex digits, from the dataset\'s commit history) and build that file'
        )


def save_mix(mix: Mix, file: Path) -> None:
    """Write a mix as JSON, to be edited and built."""
    write_json(Path(file), asdict(mix))


def load_mix(file: Path) -> Mix:
    """Read a mix written by ``save_mix``. Raises UserError for unknown or missing fields and bad shares."""
    described = read_json(file, "mix")
    known = {field.name for field in fields(Source)}
    try:
        rows = described["sources"]
        for row in rows:
            if unknown := set(row) - known:
                raise UserError(
                    f"mix {file}: unknown field {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}"
                )
        sources = tuple(Source(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}) for row in rows)
        mix = Mix(str(described["name"]), sources)
        total = sum(source.share for source in sources)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"mix {file} is not a mix ({error}); it needs a name and sources, as save_mix writes"
        ) from error
    if not sources or abs(total - 1) > 0.005 or any(source.share <= 0 for source in sources):
        raise UserError(f"mix {file}: the shares must be positive and add up to 1, not {total:.4f}")
    return mix


def read_source(source: Source, max_bytes: int, seed: int, log: Callable[[str], None]) -> Iterator[Document]:
    """Stream a source in a seeded order until ``max_bytes`` of text. Needs ``cognica-poe[datasets]`` and a network."""
    part = max_bytes / len(source.configs)
    for number, config in enumerate(source.configs):
        language = source.languages[number if len(source.languages) > 1 else 0]
        reached = 0
        for document in _read_config(source, config, language, seed):
            if reached >= part:
                break
            reached += len(document.text.encode("utf-8", "replace"))
            yield document
        log(f"data: {source.name} ({config}): {reached / 1e6:.1f} of {part / 1e6:.1f} MB")


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


_CC_BY_SA = "CC-BY-SA-4.0"
FRONTIER_V1 = Mix(
    name="frontier_v1",
    # Names and shares are those of the released 3B model's card. It does not name dataset ids (but for one mirror)
    # nor revisions: the ids are the usual homes of these sets, the revisions are the builder's to pin.
    sources=(
        Source("fineweb-edu", "HuggingFaceFW/fineweb-edu", 0.335, "ODC-By-1.0", id_column="id"),
        Source("dclm-baseline", "mlfoundations/dclm-baseline-1.0", 0.241, "CC-BY-4.0"),
        Source(
            "stack-v2",
            "codeparrot/github-code-clean",
            0.157,
            "each repository's own (column license)",
            languages=("code",),
            text_column="code",
            files="data/*.parquet",
        ),
        Source("wikipedia", "wikimedia/wikipedia", 0.052, _CC_BY_SA, configs=("20231101.en",), id_column="url"),
        Source(
            "culturax",
            "uonlp/CulturaX",
            0.052,
            "ODC-By-1.0 (mC4) and CC0-1.0 (OSCAR)",
            configs=("ko", "zh", "ja", "es", "fr"),
            languages=("ko", "zh", "ja", "es", "fr"),
            id_column="url",
        ),
        Source(
            "proof-pile-2",
            "EleutherAI/proof-pile-2",
            0.042,
            "each part's own",
            configs=("arxiv", "open-web-math", "algebraic-stack"),
            files="{config}/train/*.jsonl.zst",
        ),
        Source("open-web-math", "open-web-math/open-web-math", 0.042, "ODC-By-1.0", id_column="url"),
        Source("gutenberg", "sedthh/gutenberg_english", 0.042, "public domain in the USA", text_column="TEXT"),
        Source("pg19", "emozilla/pg19", 0.021, "Apache-2.0", id_column="url"),
        Source("ultrachat", "stingning/ultrachat", 0.010, "MIT", text_column="data", id_column="id"),
        Source("openhermes-2.5", "teknium/OpenHermes-2.5", 0.006, "not stated", text_column="conversations"),
    ),
)
