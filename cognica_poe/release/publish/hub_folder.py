"""A local Hub cache folder as a place to publish to: what ``from_pretrained(..., cache_dir=FOLDER)`` reads offline.

    FOLDER/models--org--name/blobs/<sha256>                       every distinct file once
                             snapshots/<commit>/config.json  ->   ../../blobs/<sha256>
                             refs/step-300                        the commit, written last

Identical files of all revisions share a blob. A commit id is made from the content, so the same release has the same id
everywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from cognica_poe.errors import UserError
from cognica_poe.files import (
    MANIFEST,
    Manifest,
    atomic_folder,
    disk_errors,
    put_file,
    require_space,
    safe_name,
    sha256_file,
    verify_manifest,
    write_bytes,
)
from cognica_poe.leftovers import partial_file, sweep
from cognica_poe.locks import hold
from cognica_poe.release.publish.tree import DamagedRevision, Tree, content_id, source_sha256

_COMMIT = re.compile(r"[0-9a-f]{40}")

_WAIT = 600.0  # seconds for another process to finish publishing here


class HubFolder:
    """One repository inside a local Hub cache folder."""

    def __init__(self, folder: Path, repo_id: str) -> None:
        self.repo_id = safe_name(repo_id, "repository id", nested=True)
        self.base = Path(folder) / f"models--{repo_id.replace('/', '--')}"
        self.where = f"file:{folder}"

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, keep it for this process, and remove what a killed one left half-written."""
        with hold(self.base, wait=_WAIT):
            for part in ("blobs", "refs", "snapshots"):
                with disk_errors(self.base):
                    (self.base / part).mkdir(parents=True, exist_ok=True)
                sweep(self.base / part)
            yield

    def refs(self) -> dict[str, str]:
        """``{name: commit}``. Raises UserError for a reference that names no commit."""
        files = [file for file in sorted((self.base / "refs").glob("*")) if file.is_file()]
        texts = {file: file.read_text(encoding="utf-8", errors="replace").strip() for file in files}
        for file, text in texts.items():
            if not _COMMIT.fullmatch(safe_name(text, f"{file}: commit")):
                raise UserError(f"{file} is corrupt: it names no revision; delete it and publish again")
        return {file.name: text for file, text in texts.items()}

    def read(self, commit: str, name: str) -> bytes:
        """One file of a revision. Raises DamagedRevision where it is not what the revision's id and manifest say."""
        manifest = self._read(commit, MANIFEST)
        if (found := content_id(manifest)) != commit:
            raise DamagedRevision(
                f"{self.snapshot(commit) / MANIFEST} is corrupt: its id is {found[:12]}, expected {commit[:12]}; "
                "publish that step again"
            )
        if name == MANIFEST:
            return manifest
        file, data = self.snapshot(commit) / safe_name(name, "file name"), self._read(commit, name)
        expected = Manifest.parse(manifest, file.parent / MANIFEST).digests.get(name, "of no listed file")
        if (digest := source_sha256(data)) != expected:
            raise DamagedRevision(
                f"{file} is corrupt: its sha256 is {digest[:12]}, expected {expected[:12]}; publish that step again"
            )
        return data

    def _read(self, commit: str, name: str) -> bytes:
        file = self.snapshot(commit) / safe_name(name, "file name")
        try:
            return file.read_bytes()
        except FileNotFoundError as error:
            raise DamagedRevision(
                f"{file} is missing, and a file in {self.base / 'refs'} names that revision: publish that step again"
            ) from error

    def snapshot(self, commit: str) -> Path:
        """The folder of a revision."""
        return self.base / "snapshots" / safe_name(commit, "revision")

    def holds(self, commit: str, tree: Tree) -> bool:
        """Whether the revision is ``tree``, undamaged."""
        if commit != content_id(_manifest(tree)) or not self.snapshot(commit).is_dir():
            return False
        try:
            verify_manifest(self.snapshot(commit))
        except UserError:
            return False
        return {file.name for file in self.snapshot(commit).iterdir()} == set(tree)

    def put(self, ref: str, tree: Tree) -> str:
        """Store ``tree``, read it back, then point ``ref`` at it. Returns the commit."""
        manifest = _manifest(tree)
        commit, digests = content_id(manifest), Manifest.parse(manifest, f"{MANIFEST} of {ref}").digests
        ref = safe_name(ref, "reference")
        with disk_errors(self.base):
            blobs = {name: self._blob(source, digests.get(name)) for name, source in tree.items()}
            with atomic_folder(self.snapshot(commit), "release", trusted=True) as folder:
                for name, blob in blobs.items():
                    (folder / safe_name(name, "file name")).symlink_to(os.path.join("..", "..", "blobs", blob))
            verify_manifest(self.snapshot(commit))
            write_bytes(self.base / "refs" / ref, commit.encode())
        return commit

    def finish(self, ref: str, commit: str) -> None:
        """Nothing is left to do after ``put``."""

    def _blob(self, source: Path | bytes, digest: str | None) -> str:
        """Store one file under its sha256 unless an undamaged one is there; returns that name."""
        if isinstance(source, Path) and digest is None:  # the manifest itself: small
            source = source.read_bytes()
        digest = digest or source_sha256(source)
        blob = self.base / "blobs" / digest
        if blob.is_file() and sha256_file(blob) == digest:
            return digest
        if isinstance(source, bytes):
            write_bytes(blob, source)
            return digest
        require_space(blob, source.stat().st_size)
        with partial_file(blob.parent) as (out, partial), open(source, "rb") as data:
            shutil.copyfileobj(data, out, 1 << 20)
            put_file(out, partial, blob)
        return digest


def resolve_revision(folder: Path, repo_id: str, revision: str = "main") -> Path:
    """The snapshot folder of a published revision. Raises UserError listing what there is."""
    hub = HubFolder(Path(folder), repo_id)
    refs = hub.refs()
    commit = refs.get(revision, revision)
    if not hub.snapshot(commit).is_dir():
        known = ", ".join(refs) or "none"
        raise UserError(f"{repo_id} in {folder} has no revision {revision!r}; published there: {known}")
    return hub.snapshot(commit)


def _manifest(tree: Tree) -> bytes:
    source = tree[MANIFEST]
    return source if isinstance(source, bytes) else source.read_bytes()
