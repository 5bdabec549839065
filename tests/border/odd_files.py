"""Odd files: how one is put in its place, and JSON that is broken in every way."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cognica_poe.data.mixes import FRONTIER_V1, PinnedFile, save_mix
from cognica_poe.files import MANIFEST, write_manifest

Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class OddFile:
    """A file that is spoilt, and the right line that reads it."""

    name: str
    file: str
    """Relative to the world."""
    spoil: Spoil
    line: str
    seal: str | None = None
    """Folder whose manifest is made again afterwards: whoever spoilt the file did that too."""
    kind: str = "release"


@contextlib.contextmanager
def spoilt(base: Path, odd: OddFile) -> Iterator[None]:
    """The odd file in its place; what was there before comes back."""
    file = base / odd.file
    owner = base / odd.seal if odd.seal else file
    saved = base.parent / "saved"
    if owner.is_dir():
        shutil.copytree(owner, saved, symlinks=True)
    elif owner.exists():
        shutil.copy2(owner, saved)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        odd.spoil(file)
        if odd.seal:
            (owner / MANIFEST).unlink()
            write_manifest(owner, odd.kind)
        yield
    finally:
        for path in {file, owner}:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if saved.exists():
            os.replace(saved, owner)


def _bytes(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda file: file.write_bytes(change(file.read_bytes())) and None


def to_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BROKEN: dict[str, Spoil] = {
    "empty": _bytes(lambda data: b""),
    "half": _bytes(lambda data: data[: len(data) // 2]),
    "one brace": _bytes(lambda data: b"{"),
    "a list": _bytes(lambda data: b"[]"),
    "null": _bytes(lambda data: b"null"),
    "a number": _bytes(lambda data: b"7"),
    "a string": _bytes(lambda data: b'"[red]text[/red]"'),
    "an empty object": _bytes(lambda data: b"{}"),
    "deep lists": _bytes(lambda data: b"[" * 100_000),
    "deep objects": _bytes(lambda data: b'{"a":' * 100_000),
    "deep and whole": _bytes(lambda data: b"[" * 50_000 + b"]" * 50_000),
    "a huge integer": _bytes(lambda data: re.sub(rb": \d[^,}\s]*", b": " + b"9" * 5000, data, count=1)),
    "not UTF-8": _bytes(lambda data: data.replace(b'"', b'"\xff', 1)),
    "UTF-16": _bytes(lambda data: data.decode().encode("utf-16")),
    "a byte order mark": _bytes(lambda data: b"\xef\xbb\xbf" + data),
    "noise": _bytes(lambda data: bytes(range(256)) * 4),
    "zeros": _bytes(lambda data: bytes(len(data))),
    "a folder": to_folder,
    "missing": lambda file: file.unlink(),
}
"""What can befall a file of JSON."""
TWICE: Spoil = _bytes(lambda data: re.sub(rb'^(\s*\{\s*)("\w+": )', rb"\1\g<2>null, \2", data, count=1))
"""Its first key twice."""


HARMLESS = {("an empty object", "generation_config.json"), ("an empty object", "tokenizer_config.json")}
"""Files of which nothing that is said must be said."""


def broken_json() -> Iterator[OddFile]:
    """Every JSON file that a command reads, in every way broken."""
    readers = {
        "recipe.json": "params {recipe}",
        "run/recipe.json": "data which-docs {run} --step 0",
        "mix.json": "data build {base}/mix.json --max-bytes 1000 --out {new}",
        "run/data/manifest.json": "data pack {run}/data --tokenizer {run}/tokenizer --out {new} --row-len 65",
        "run/tokenizer/tokenizer.json": "data pack {run}/data --tokenizer {run}/tokenizer --out {new} --row-len 65",
        "run/release/step-4/config.json": "generate {release} Hi --max-new-tokens 4",
        "run/release/step-4/generation_config.json": "generate {release} Hi --max-new-tokens 4",
        "run/release/step-4/tokenizer.json": "generate {release} Hi --max-new-tokens 4",
        "run/release/step-4/tokenizer_config.json": "generate {release} Hi --max-new-tokens 4",
        "run/release/step-4/release.json": "publish {run} --to file:{new}",
        "run/analysis/step-2.json": "export {run} --step 2 --out {new}",
        "run/analysis/step-4.json": "export {run} --step 4 --out {new}",
        "run/checkpoints/step-2/state.json": "export {run} --step 2 --out {new}",
    }
    seals = {"run/release/step-4": "release", "run/data": "data", "run/tokenizer": "tokenizer"}
    seals["run/checkpoints/step-2"] = "checkpoint"
    for file, line in readers.items():
        for name, spoil in {**BROKEN, "a key twice": TWICE}.items():
            yield OddFile(f"{file}: {name}", file, spoil, line)
        folder = file.rpartition("/")[0]
        if folder in seals:
            for name, spoil in BROKEN.items():
                if name not in ("missing", "a folder") and (name, file.rpartition("/")[2]) not in HARMLESS:
                    yield OddFile(f"{file}: {name}, sealed", file, spoil, line, folder, seals[folder])


def write_mix(file: Path) -> None:
    """A mix with a revision and a file of every source, which nobody has."""
    sources = []
    for source in FRONTIER_V1.sources:
        files = tuple(PinnedFile(f"{config}.parquet", 10, "0" * 64, config) for config in source.configs)
        sources.append(replace(source, revision="0" * 40, pinned=files))
    save_mix(replace(FRONTIER_V1, sources=tuple(sources)), file)
