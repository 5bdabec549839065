"""Mixes: named lists of Hub datasets with shares, pinned revisions and licences; built in, or from a JSON file."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import read_json, write_json

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        settings: list[dict[str, Any]] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
        ]
        sources = tuple(Source(**setting) for setting in settings)
        mix = Mix(str(described["name"]), sources)
        total = sum(source.share for source in sources)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"mix {file} is not a mix ({error}); it needs a name and sources, as save_mix writes"
        ) from error
    if not sources or abs(total - 1) > 0.005 or any(source.share <= 0 for source in sources):
        raise UserError(f"mix {file}: the shares must be positive and add up to 1, not {total:.4f}")
    return mix


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

PYTHON_DOCS = "python-docs"
"""The embedded corpus (``data.sources.python_docs``): a name like a mix's, without Hub datasets."""
MIXES: dict[str, Mix | None] = {PYTHON_DOCS: None, FRONTIER_V1.name: FRONTIER_V1}
"""Mixes by name."""
