"""Mixes: named lists of Hub datasets with shares, pinned files and licences; built in, or from a JSON file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from cognica_poe.data.documents import unit_hash
from cognica_poe.errors import UserError
from cognica_poe.files import read_json, safe_name, write_json

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
FORMATS = {".parquet": 1.5, ".jsonl.zst": 2.0, ".jsonl.gz": 2.0, ".jsonl": 0.8, ".json": 0.8}
"""Endings of data files that can be read, with the bytes of text that a byte of the file holds, cautiously."""
_MARGIN = 1.1


@dataclass(frozen=True)
class PinnedFile:
    """One data file of a dataset at its pinned revision."""

    path: str
    """In the dataset's repository."""
    size: int
    """Bytes."""
    sha256: str
    config: str = "default"


@dataclass(frozen=True)
class Source:
    """One source of a mix."""

    name: str
    """Name in the mix, kept in every document."""
    dataset: str
    """Hub dataset id."""
    share: float
    """Part of the mix's tokens, between 0 and 1."""
    licence: str
    """Licence that the dataset states."""
    revision: str | None = None
    """Commit of the dataset, 40 hex digits; ``data mix pin`` fills it in, and ``pinned``."""
    configs: tuple[str, ...] = ("default",)
    """Configurations, read in equal parts."""
    languages: tuple[str, ...] = ("en",)
    """One per configuration, or one for all: ISO 639-1, or ``code``."""
    files: str = "*"
    """Pattern of the data files; ``{config}`` stands for the configuration, ``*`` for any characters, / included."""
    text_column: str = "text"
    """Holds the text; a list of turns is joined into one text."""
    id_column: str | None = None
    """Named in a document's origin, behind file and row."""
    bytes_per_token: float = 4.2
    """UTF-8 bytes of text per token, to make bytes of a share of tokens."""
    text_per_byte: float | None = None
    """Bytes of text that a byte of its files holds; by the kind of file where None."""
    pinned: tuple[PinnedFile, ...] = ()
    """The files to read, in the order in which they are."""

    def language(self, config: str) -> str:
        """Language of a configuration."""
        return self.languages[self.configs.index(config) if len(self.languages) > 1 else 0]

    def text_bytes(self, file: PinnedFile) -> float:
        """Bytes of text that a file is expected to hold."""
        ratio = self.text_per_byte or next(ratio for ending, ratio in FORMATS.items() if file.path.endswith(ending))
        return ratio * file.size


@dataclass(frozen=True)
class Mix:
    """A named list of sources whose shares add up to one."""

    name: str
    sources: tuple[Source, ...]
    bytes: int | None = None
    """Text to read of all sources together, where no other size is asked for."""


def unpinned(mix: Mix) -> list[str]:
    """Names of the sources without a full commit hash or without files."""
    return [source.name for source in mix.sources if not (_COMMIT.fullmatch(source.revision or "") and source.pinned)]


def require_pinned(mix: Mix) -> None:
    """Raise UserError unless every source names a commit and its files."""
    if missing := unpinned(mix):
        raise UserError(
            f"mix {mix.name} names no revision and files of {', '.join(missing)}: write a file that does with "
            f"`cognica-poe data mix pin {mix.name} --out mix.json`, and name the file instead"
        )


def byte_shares(mix: Mix) -> dict[str, float]:
    """Part of the mix's bytes by source, of the shares that the mix states in tokens."""
    weights = {source.name: source.share * source.bytes_per_token for source in mix.sources}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def text_sizes(mix: Mix, *, tokens: int | None = None, max_bytes: int | None = None) -> dict[str, int]:
    """Bytes of text to read of each source, for so many ``tokens`` or bytes in all, or the size that the mix states.

    Raises UserError where none is known.
    """
    if tokens is not None:
        return {source.name: round(source.share * tokens * source.bytes_per_token) for source in mix.sources}
    size = max_bytes or mix.bytes
    if size is None:
        raise UserError(f"mix {mix.name} needs a size: pass --max-bytes, or --data.max-bytes with a recipe")
    return {name: round(share * size) for name, share in byte_shares(mix).items()}


def choose_files(source: Source, wanted: int) -> list[PinnedFile]:
    """The pinned files, in the order of a hash, that hold ``wanted`` bytes of text as far as their sizes tell.

    Each configuration gives an equal part, and at least one file. Fewer than wanted where there are no more files.
    """
    chosen = []
    for config in source.configs:
        left = _MARGIN * wanted / len(source.configs)
        files = [file for file in source.pinned if file.config == config]
        for file in sorted(files, key=lambda file: (unit_hash("file", file.path), file.path)):
            if left > 0:
                chosen.append(file)
                left -= source.text_bytes(file)
    return chosen


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
        raise UserError(
            f"mix {file} is not a mix ({where}: {first['msg'].lower()}); `data mix pin` makes one"
        ) from error
    safe_name(mix.name, f"mix {file}: name")
    for source in mix.sources:
        if problem := _problem(source):
            raise UserError(f"mix {file}: source {source.name!r}: {problem}")
        for pinned in source.pinned:
            safe_name(pinned.path, f"mix {file}: source {source.name!r}: file", nested=True)
    names = [source.name for source in mix.sources]
    if len(set(names)) < len(names):
        raise UserError(f"mix {file}: two sources have the same name; give each its own")
    total = sum(source.share for source in mix.sources)
    if not abs(total - 1) <= 0.005 or any(not source.share > 0 for source in mix.sources):
        raise UserError(f"mix {file}: the shares must be positive and add up to 1, not {total:.4g}")
    if mix.bytes is not None and not 0 < mix.bytes < 2**62:
        raise UserError(f"mix {file}: bytes is {mix.bytes}; it must be at least 1")
    return mix


def _problem(source: Source) -> str | None:
    """What makes it impossible to read ``source``, whatever the Hub holds."""
    if not source.name or not source.name.isprintable():
        return "the name must be printable text"
    if not _DATASET.fullmatch(source.dataset):
        return f"dataset {source.dataset!r} must read org/name"
    if not source.configs or not all(source.configs) or len(set(source.configs)) < len(source.configs):
        return "configs must name at least one configuration, each once"
    if len(source.languages) not in (1, len(source.configs)) or not all(source.languages):
        return "languages must be one for all configurations, or one for each"
    if not source.text_column or not source.files:
        return "text_column and files must have a value"
    if re.search(r"[{}]", source.files.replace("{config}", "")):
        return f"files {source.files!r} may hold {{config}} and no other braces"
    if len(source.configs) > 1 and "{config}" not in source.files:
        return "files must hold {config}, to tell the configurations' files apart"
    if source.id_column == "":
        return "id_column must have a name or be null"
    for name in ("bytes_per_token", "text_per_byte"):
        value = getattr(source, name)
        if value is not None and not 0.01 <= value <= 100:
            return f"{name} is {value}; it must be 0.01 to 100"
    return next(filter(None, (_file_problem(source, file) for file in source.pinned)), None)


def _file_problem(source: Source, file: PinnedFile) -> str | None:
    if not file.path.endswith(tuple(FORMATS)):
        return f"file {file.path} cannot be read: supported are {', '.join(FORMATS)}"
    if file.size < 0 or not _SHA256.fullmatch(file.sha256):
        return f"file {file.path} needs a size of at least 0 and a sha256 of 64 hex digits"
    if file.config not in source.configs:
        return f"file {file.path} names config {file.config!r}, which is none of the source's"
    return None


_CC_BY_SA = "CC-BY-SA-4.0"
FRONTIER_V1 = Mix(
    name="frontier_v1",
    # Names and shares are those of the released 3B model's card. It does not name dataset ids (but for one mirror)
    # nor revisions: the ids are the usual homes of these sets, and pinning resolves the revisions. Bytes per token are
    # those of the stand-ins of ``frontier-mini`` under a vocabulary of 32,768 (docs/data.md).
    sources=(
        Source(
            "fineweb-edu",
            "HuggingFaceFW/fineweb-edu",
            0.335,
            "ODC-By-1.0",
            files="data/*.parquet",
            id_column="url",
            bytes_per_token=4.38,
        ),
        Source(
            "dclm-baseline",
            "mlfoundations/dclm-baseline-1.0",
            0.241,
            "CC-BY-4.0",
            files="*.jsonl.zst",
            id_column="url",
            bytes_per_token=4.5,
        ),
        Source(
            "stack-v2",
            "codeparrot/github-code-clean",
            0.157,
            "each repository's own (column license)",
            languages=("code",),
            files="data/*.parquet",
            text_column="code",
            id_column="repo_name",
            bytes_per_token=3.99,
        ),
        Source(
            "wikipedia",
            "wikimedia/wikipedia",
            0.052,
            _CC_BY_SA,
            configs=("20231101.en",),
            files="{config}/*.parquet",
            id_column="url",
            bytes_per_token=4.12,
        ),
        Source(
            "culturax",
            "uonlp/CulturaX",
            0.052,
            "ODC-By-1.0 (mC4) and CC0-1.0 (OSCAR)",
            configs=("ko", "zh", "ja", "es", "fr"),
            languages=("ko", "zh", "ja", "es", "fr"),
            files="{config}/*.parquet",
            id_column="url",
            bytes_per_token=3.45,
        ),
        Source(
            "proof-pile-2",
            "EleutherAI/proof-pile-2",
            0.042,
            "each part's own",
            configs=("arxiv", "open-web-math", "algebraic-stack"),
            files="{config}/train/*.jsonl.zst",
            bytes_per_token=3.32,
        ),
        Source(
            "open-web-math",
            "open-web-math/open-web-math",
            0.042,
            "ODC-By-1.0",
            files="data/*.parquet",
            id_column="url",
            bytes_per_token=3.45,
        ),
        Source(
            "gutenberg",
            "sedthh/gutenberg_english",
            0.042,
            "public domain in the USA",
            files="data/*.parquet",
            text_column="TEXT",
            id_column="SOURCE",
            bytes_per_token=4.2,
        ),
        Source(
            "pg19", "emozilla/pg19", 0.021, "Apache-2.0", files="data/*.parquet", id_column="url", bytes_per_token=4.15
        ),
        Source(
            "ultrachat",
            "stingning/ultrachat",
            0.010,
            "MIT",
            files="*.jsonl",
            text_column="data",
            id_column="id",
            bytes_per_token=3.92,
        ),
        Source(
            "openhermes-2.5",
            "teknium/OpenHermes-2.5",
            0.006,
            "not stated",
            files="openhermes2_5.json",
            text_column="conversations",
            id_column="source",
            bytes_per_token=3.39,
        ),
    ),
)

PYTHON_DOCS = "python-docs"
"""The embedded corpus (``data.sources.python_docs``): a name like a mix's, without Hub datasets."""
MIXES: dict[str, Mix | None] = {PYTHON_DOCS: None, FRONTIER_V1.name: FRONTIER_V1}
"""Mixes by name."""
