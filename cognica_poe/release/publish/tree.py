"""The content of one revision as a mapping from file name to where its bytes are: a path, or bytes made on the spot."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cognica_poe.analysis.sums import Sums
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, sha256_file
from cognica_poe.release.card.markdown import render_card
from cognica_poe.release.checkpoints import TABLE, TRAJECTORY, as_csv, as_jsonl, line_of
from cognica_poe.release.export import WEIGHTS, Release

Tree = dict[str, Path | bytes]


class DamagedRevision(UserError):
    """A published revision that is not what it was: publishing its step again repairs it."""


@dataclass(frozen=True)
class Published:
    """One step on a hub."""

    step: int
    commit: str
    digests: Mapping[str, str]
    """sha256 of every file, from the revision's manifest."""
    record: dict[str, Any]
    sums: Sums | None = None
    """Of the record, where the revision holds them."""
    about: dict[str, Any] = field(default_factory=dict)
    """``release.json``."""

    @property
    def weights_sha256(self) -> str:
        """Of ``model.safetensors``."""
        return self.digests[WEIGHTS]

    @property
    def outline(self) -> Tree:
        """Names and manifest of its files, without their content."""
        return {**dict.fromkeys(self.digests, b""), MANIFEST: Manifest("release", self.digests).data()}

    @property
    def code(self) -> dict[str, str]:
        """sha256 of the model code by file."""
        return code_of(self.digests)


def code_of(digests: Mapping[str, str]) -> dict[str, str]:
    """The part of a manifest that is code."""
    return {name: digest for name, digest in digests.items() if name.endswith(".py")}


def tree_of(path: Path) -> Tree:
    """Every file of a checked release folder."""
    return {file.relative_to(path).as_posix(): file for file in sorted(Path(path).rglob("*")) if file.is_file()}


def source_sha256(source: Path | bytes) -> str:
    """Hex sha256 of a file of a tree."""
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_file(source)


def source_git_sha1(source: Path | bytes) -> str:
    """Git's blob id of a (small) file of a tree."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def content_id(manifest: bytes) -> str:
    """40 hex digits that stand for a revision's content: sha1 of its manifest, which names every file's sha256."""
    return hashlib.sha1(manifest, usedforsecurity=False).hexdigest()


def has_mark(manifest: bytes) -> bool:
    """Whether a manifest is that of a release of ours, or damaged."""
    try:
        return Manifest.parse(manifest, MANIFEST).kind == "release"
    except UserError:
        return True


def written_by_us(manifest: bytes) -> dict[str, str]:
    """sha256 by name of the files of a published revision that we wrote, its manifest among them; none without mark."""
    try:
        read = Manifest.parse(manifest, MANIFEST)
    except UserError:
        return {}
    return {**read.digests, MANIFEST: source_sha256(manifest)} if read.kind == "release" else {}


def digests_of(tree: Tree) -> dict[str, str]:
    """sha256 of every file of a tree, by its own manifest."""
    source = tree[MANIFEST]
    manifest = source if isinstance(source, bytes) else source.read_bytes()
    return {**Manifest.parse(manifest, MANIFEST).digests, MANIFEST: source_sha256(manifest)}


def trajectory_line(published: Published) -> dict[str, Any]:
    """What one line of ``trajectory.jsonl`` says of a step."""
    return line_of(published.record, published.about, published.weights_sha256, published.commit)


def main_outline(files: Tree) -> Tree:
    """``main_tree`` before all is published, from the latest step's files: what is made only then is empty."""
    tree = {**files, "README.md": b"", TRAJECTORY: b"", TABLE: b""}
    kept = digests_of(files)
    digests = {
        name: kept[name] if source else source_sha256(source) for name, source in tree.items() if name != MANIFEST
    }
    return {**tree, MANIFEST: Manifest("release", digests).data()}


def main_tree(latest: Release, steps: Sequence[Published]) -> Tree:
    """What ``main`` holds: the latest release, with the card and the trajectory of all steps."""
    steps = sorted(steps, key=lambda published: published.step)
    lines = [trajectory_line(item) for item in steps]
    about = {**latest.about, "config": latest.config, "revisions": {item.step: item.commit for item in steps}}
    tree = {name: source for name, source in tree_of(latest.path).items() if name != MANIFEST}
    sums = {item.step: item.sums for item in steps if item.sums is not None}
    tree["README.md"] = render_card([item.record for item in steps], {**about, "trajectory": lines}, sums).encode()
    tree |= {TRAJECTORY: as_jsonl(lines), TABLE: as_csv(lines)}
    tree[MANIFEST] = Manifest("release", {name: source_sha256(source) for name, source in tree.items()}).data()
    return tree
