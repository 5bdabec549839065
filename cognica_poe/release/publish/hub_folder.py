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
from collections.abc import Callable, Collection, Iterator
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
from cognica_poe.release.publish.ownership import Change, change_of, require_ours
from cognica_poe.release.publish.tree import (
    DamagedRevision,
    Tree,
    content_id,
    digests_of,
    has_mark,
    source_sha256,
    written_by_us,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WAIT = 600.0  # seconds for another process to finish publishing here


class HubFolder:
    """One repository inside a local Hub cache folder."""

    def __init__(
        self, folder: Path, repo_id: str, *, replace: bool = False, log: Callable[[str], None] = lambda line: None
    ) -> None:
        """``replace``: files that we did not write may be replaced; each is named in ``log``."""
        self._replace, self._log = replace, log
        self.repo_id = safe_name(repo_id, "repository id", nested=True)
        self.base = Path(folder) / f"models--{repo_id.replace('/', '--')}"
        self.where = f"file:{folder}"

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, keep it for this process, and remove what a killed one left half-written."""
        with hold(self.base, wait=_WAIT):
            for part in ("blobs", "refs", "snapshots"):
                if (self.base / part).is_symlink():
                    raise UserError(f"{self.base / part} is a link: a repository of a Hub cache folder holds none")
                with disk_errors(self.base):
                    (self.base / part).mkdir(parents=True, exist_ok=True)
                sweep(self.base / part)
            yield

    def refs(self, rewritten: Collection[str] = ()) -> dict[str, str]:
        """``{name: commit}``. Raises UserError for one that names no commit, unless it is to be ``rewritten``."""
        found = {}
        for file in sorted((self.base / "refs").glob("*")):
            if file.is_file():
                text = file.read_text(encoding="utf-8", errors="replace").strip()
                if _COMMIT.fullmatch(text):
                    found[file.name] = text
                elif file.name in rewritten:
                    self._log(f"publish: {file} names no revision; it is written again")
                else:
                    safe_name(text, f"{file}: commit")
                    raise UserError(f"{file} is corrupt: it names no revision; delete it and publish again")
        return found

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

    def is_ours(self, commit: str) -> bool:
        """Whether the revision carries a manifest of ours, damaged, missing or not."""
        file = self.snapshot(commit) / MANIFEST
        return not file.is_file() or has_mark(file.read_bytes())

    def check(self, ref: str, tree: Tree) -> None:
        """Raise UserError when ``ref`` holds files that ``tree`` may not replace."""
        for commit in (self._head(ref), content_id(_manifest(tree))):
            require_ours(self._change(commit, tree), self._replace, f"{ref} at {self.where}")

    def holds(self, commit: str, tree: Tree) -> bool:
        """Whether the revision holds ``tree``, undamaged, and nothing else that we wrote."""
        return commit == content_id(_manifest(tree)) and not self._change(commit, tree)

    def put(self, ref: str, tree: Tree) -> str:
        """Store ``tree`` beside what others put into that revision, read it back, then point ``ref`` at it.

        Returns the commit. Raises UserError as ``check``.
        """
        manifest = _manifest(tree)
        commit, digests = content_id(manifest), Manifest.parse(manifest, f"{MANIFEST} of {ref}").digests
        ref = safe_name(ref, "reference")
        kept: dict[str, Path] = {}
        for earlier in (self._head(ref), commit):
            change = self._change(earlier, tree)
            if said := require_ours(change, self._replace, f"{ref} at {self.where}"):
                self._log(said)
            held = self._held(earlier)
            kept |= {name: held[name] for name in held.keys() - tree.keys() - set(change.remove)}
        with disk_errors(self.base):
            blobs = {name: self._blob(source, digests.get(name)) for name, source in tree.items()}
            with atomic_folder(self.snapshot(commit), "release", trusted=True) as folder:
                for name, blob in blobs.items():
                    (folder / safe_name(name, "file name")).symlink_to(_link(blob))
                for name, file in kept.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, folder / name, follow_symlinks=False)
            verify_manifest(self.snapshot(commit))
            write_bytes(self.base / "refs" / ref, commit.encode())
        return commit

    def _head(self, ref: str) -> str | None:
        """The commit of one reference, None where it is missing or damaged."""
        file = self.base / "refs" / ref
        text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
        return text if _COMMIT.fullmatch(text) else None

    def _held(self, commit: str | None) -> dict[str, Path]:
        """Files and links of a revision by name; none where it is not there."""
        folder = self.snapshot(commit) if commit else None
        if folder is None or folder.is_symlink():
            return {}
        return {
            file.relative_to(folder).as_posix(): file
            for file in folder.rglob("*")
            if file.is_symlink() or not file.is_dir()
        }

    def _change(self, commit: str | None, tree: Tree) -> Change:
        held, wanted = self._held(commit), digests_of(tree)
        written: dict[str, str] = {}
        if commit == content_id(_manifest(tree)):  # by its name ours, even where its manifest is damaged
            written = wanted
        elif MANIFEST in held and held[MANIFEST].is_file():
            written = written_by_us(held[MANIFEST].read_bytes())
        links = {name: _blob_of(held[name]) for name in held.keys() & wanted.keys()}
        if not written and (links.get(MANIFEST) or links.get("config.json")):  # ours, with a damaged manifest
            written = {name: blob for name, blob in links.items() if blob}

        def same(name: str) -> bool:
            return held[name].is_file() and sha256_file(held[name]) == wanted[name]

        def ours(name: str) -> bool:
            if name not in written:
                return False
            if held[name].is_symlink() and os.readlink(held[name]) == _link(written[name]):
                return True  # a blob of ours, damaged or not: its name says what it is to hold
            return held[name].is_file() and sha256_file(held[name]) == written[name]

        return change_of(tree, held, same=same, ours=ours)

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
    if revision in refs and not hub.snapshot(commit).is_dir():
        raise UserError(f"{hub.base / 'refs' / revision} names {commit}, which is not there; publish that step again")
    if not hub.snapshot(commit).is_dir():
        known = ", ".join(refs) or "none"
        raise UserError(f"{repo_id} in {folder} has no revision {revision!r}; published there: {known}")
    return hub.snapshot(commit)


def _link(blob: str) -> str:
    return os.path.join("..", "..", "blobs", blob)


def _blob_of(entry: Path) -> str | None:
    """sha256 in the link to a blob of ours. The Hub's client has that for large files alone, a git SHA-1 for others."""
    blob = os.readlink(entry).rpartition("/")[2] if entry.is_symlink() else ""
    return blob if _SHA256.fullmatch(blob) and os.readlink(entry) == _link(blob) else None


def _manifest(tree: Tree) -> bytes:
    source = tree[MANIFEST]
    return source if isinstance(source, bytes) else source.read_bytes()
