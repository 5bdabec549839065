"""Mixes: named lists of Hub datasets with shares, pinned revisions and licences; built in, or from a JSON file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from cognica_poe.errors import UserError
from cognica_poe.files import read_json, safe_name, write_json

_COMMIT = re.compile(r"[0-9a-f]{40}")
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


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
            f"mix {mix.name} names no revision of {', '.join(missing)}: write it to a file with `cognica-poe data mix "
            f'{mix.name} --out mix.json`, fill in each "revision" (commit of the dataset, 40 hex digits) and name the '
            "file instead"
        )


def save_mix(mix: Mix, file: Path) -> None:
    """Write a mix as JSON, to be edited and built."""
    write_json(Path(file), asdict(mix))


def find_mix(name: str) -> Mix:
    """A mix of Hub datasets by name, or from a mix file. Raises UserError for anything else."""
    if name.endswith(".json"):
        return load_mix(Path(name))
    known = {key: mix for key, mix in MIXES.items() if mix is not None}
    if name not in known:
        raise UserError(
            f"no mix of Hub datasets is called {name!r}; known are {', '.join(known)}, or a mix file (.json)"
        )
    return known[name]


def load_mix(file: Path) -> Mix:
    """Read a mix written by ``save_mix``. Raises UserError for unknown, missing or mistyped fields and bad shares."""
    from pydantic import TypeAdapter, ValidationError  # a third of a second that a command's help need not wait for

    values = read_json(file, "mix")
    try:
        mix = TypeAdapter(Mix).validate_json(json.dumps(values), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"mix {file} is not a mix ({where}: {first['msg'].lower()}); `data mix` writes one") from error
    safe_name(mix.name, f"mix {file}: name")
    for source in mix.sources:
        if problem := _problem(source):
            raise UserError(f"mix {file}: source {source.name!r}: {problem}")
    names = [source.name for source in mix.sources]
    if len(set(names)) < len(names):
        raise UserError(f"mix {file}: two sources have the same name; give each its own")
    total = sum(source.share for source in mix.sources)
    if not abs(total - 1) <= 0.005 or any(not source.share > 0 for source in mix.sources):
        raise UserError(f"mix {file}: the shares must be positive and add up to 1, not {total:.4g}")
    return mix


def _problem(source: Source) -> str | None:
    """What makes it impossible to read ``source``, whatever the Hub holds."""
    if not source.name or not source.name.isprintable():
        return "the name must be printable text"
    if not _DATASET.fullmatch(source.dataset):
        return f"dataset {source.dataset!r} must read org/name"
    if not source.configs or not all(source.configs):
        return "configs must name at least one configuration"
    if len(source.languages) not in (1, len(source.configs)) or not all(source.languages):
        return "languages must be one for all configurations, or one for each"
    if not source.split or not source.text_column:
        return "split and text_column must have a name"
    if source.files is not None and re.search(r"[{}]", source.files.replace("{config}", "")):
        return f"files {source.files!r} may hold {{config}} and no other braces"
    return None


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
