"""Files on disk: atomic writes, sha256 manifests, names that are safe as paths, free-space checks.

Everything a run leaves behind goes through here, so that a crash, a full disk or a kill never leaves half a file
under its final name, and no folder that we did not make is ever replaced. A folder of ours carries the mark: its
``MANIFEST.sha256`` begins with the comment ``# cognica-poe KIND`` and lists every file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from safetensors import SafetensorError

from cognica_poe.errors import UserError
from cognica_poe.leftovers import partial_file, partial_folder, put_in_place, sweep

MANIFEST = "MANIFEST.sha256"
KINDS = ("data", "tokenizer", "release", "checkpoint", "trajectory")
"""Folders that carry the mark."""
_MARK = "# cognica-poe "  # `sha256sum -c` skips comments
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_SEAL = b"# sha256 "
_SOURCE = re.compile(r"# made from ([a-z]+) ([0-9a-f]{64})")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[Path]:
    """Make the folder ``path`` and those above it; what nothing was put into by the end goes again."""
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk's refusals (full, read-only, not permitted) into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _full(path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that you may write to") from error
        raise
    except SafetensorError as error:  # the library's own writer reports the kernel's refusal as text
        if any(f"os error {code}" in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            raise _full(path) from error
        raise


def _full(path: Path) -> UserError:
    return UserError(f"no space left while writing {path}: free some space or choose another --out")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file under its final name, or not at all."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(path.parent) as (file, partial):
            file.write(data)
            put_file(file, partial, path)


def put_file(file: IO[bytes], partial: Path, path: Path) -> None:
    """Give a ``partial_file`` that is written its final name, readable by all."""
    file.flush()
    os.fsync(file.fileno())
    os.chmod(partial, 0o644)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Atomically write ``value`` as indented JSON (NaN refused: a record holds numbers or null)."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def parse_json(data: str | bytes) -> Any:
    """The value of JSON text. Raises ValueError for anything else.

    That are also a key that comes twice, NaN and infinity, numbers of thousands of digits and nesting so deep that
    Python gives up.
    """
    try:
        return json.loads(data, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _refuse_constant(word: str) -> None:
    raise ValueError(f"it holds {word}, which is no number")


def read_json(path: Path, what: str = "file") -> Any:
    """Read JSON. Raises UserError that names ``what`` when it is missing or malformed."""
    path = Path(path)
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{what} not found: {path}") from error
    except PermissionError as error:
        raise UserError(f"{what} {path} may not be read: change its permissions") from error
    except (ValueError, IsADirectoryError) as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}); restore it or make it again") from error


@contextlib.contextmanager
def atomic_folder(
    path: Path, kind: str, *, made_from: Mapping[str, str] | None = None, trusted: bool = False, wait: float = 0.0
) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` (replacing it) once the block ends without an exception.

    All files are fsynced. The manifest with the mark of ``kind``, and with ``made_from``, is written last, unless the
    block wrote one because it knows the digests. On failure nothing stays behind. Raises UserError as
    ``require_replaceable`` does, before the block and again before the old folder goes; with ``trusted``, ``path`` is
    ours by where it lies (a run's checkpoints, a snapshot named by its content), and a damaged folder there is replaced
    as well. Raises UserError, too, when another process makes the same folder and has not ended after ``wait`` seconds.
    """
    path = Path(path)
    if not trusted:
        require_replaceable(path, kind)
    with disk_errors(path), folder_for(path.parent):
        sweep(path.parent)
        place = Path(os.path.abspath(path))
        with partial_folder(place, wait) as outer:
            partial = outer / "new" / place.name
            partial.mkdir(parents=True)
            yield partial
            if not os.path.lexists(partial / MANIFEST):
                write_manifest(partial, kind, made_from)
            for file in sorted(partial.rglob("*")):
                if not file.is_symlink():  # whoever links to a file has written it
                    file.chmod(0o755 if file.is_dir() else 0o644)  # some writers leave it readable by the owner alone
                    _fsync(file)
            _fsync(partial)
            partial.chmod(0o755)
            if not trusted:
                require_replaceable(path, kind)
            put_in_place(partial, place, outer)
            _fsync(place.parent)


def require_replaceable(path: Path, kind: str) -> None:
    """Raise UserError unless ``path`` is free, an empty folder, or a ``kind`` folder of ours with nothing added.

    Files are compared with the manifest by name alone. A path inside any folder of ours is refused too: those hold
    what their manifests list and no more.
    """
    path, absolute = Path(path), Path(os.path.abspath(path))
    parent = absolute.parent.resolve()
    for folder in (parent, *parent.parents):
        if outer := _mark_of(folder):
            raise UserError(f"{path} lies inside {folder}, a {outer} folder made by cognica-poe: choose another --out")
    if not _lies_there(path, absolute):
        return
    if absolute == Path.cwd():
        raise UserError(f"{path} is the folder that you are in: choose another --out")
    usable = absolute.is_dir() and not absolute.is_symlink()
    if not usable or (any(absolute.iterdir()) and not _made_as(absolute, kind)):
        raise UserError(
            f"{path} exists and is not a {kind} folder made by cognica-poe: choose another --out, or remove it yourself"
        )


def _lies_there(path: Path, absolute: Path) -> bool:
    """Whether something has the name. Raises UserError for one that nothing can have, or nothing of this user's."""
    try:
        absolute.lstat()
        return True
    except FileNotFoundError:
        above = next(folder for folder in absolute.parents if os.path.lexists(folder))
        if not above.is_dir():
            raise UserError(f"{path} lies below {above}, which is no folder: choose another --out") from None
        if not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"{path} cannot be made: {above} may not be written to; choose another --out") from None
        return False
    except OSError as error:  # too long, below a file, a circle of links, behind a folder that may not be read
        raise UserError(f"{path} cannot be made ({(error.strerror or '').lower()}): choose another --out") from error


def require_apart(out: Path, source: Path) -> None:
    """Raise UserError when one of the two is, or lies inside, the other: writing ``out`` would change ``source``."""
    first, second = Path(out).resolve(), Path(source).resolve()
    if first == second:
        raise UserError(f"--out {out} is what is read: choose another --out")
    if first in second.parents:
        raise UserError(f"--out {out} holds {source}, which is read: choose another --out")
    if second in first.parents:
        raise UserError(f"--out {out} lies inside {source}, which is read: choose another --out")


def _mark_of(folder: Path) -> str | None:
    """Kind of a folder of ours, whatever state it is in; None for any other."""
    try:
        with open(folder / MANIFEST, "rb") as file:
            first = file.readline(100).decode("utf-8", "replace").rstrip("\n")
    except OSError:
        return None
    return first.removeprefix(_MARK) if first.startswith(_MARK) else None


def _made_as(folder: Path, kind: str) -> bool:
    """Whether ``folder`` has the mark of ``kind`` and exactly the files of its manifest, as plain files.

    Raises UserError for a manifest with our mark that is damaged.
    """
    if _mark_of(folder) != kind:
        return False
    names = {*Manifest.read(folder, "choose another --out, or remove the folder yourself").digests, MANIFEST}
    parents = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    found = {entry.relative_to(folder).as_posix(): entry for entry in folder.rglob("*")}
    files = {name for name, entry in found.items() if entry.is_file() and not entry.is_symlink()}
    return files == names and set(found) <= names | parents


def safe_name(name: Any, what: str, *, nested: bool = False) -> str:
    """``name``, for use as one part of a path (``nested``: as a relative path with ``/``), wherever it came from.

    Raises UserError, beginning with ``what``, for anything that could lead elsewhere or that no file should be
    called: no text, empty, ``.`` or ``..``, absolute, with separators, a drive letter or unprintable characters,
    above 255 bytes.
    """
    parts = name.split("/") if isinstance(name, str) and nested else [name]
    if not all(isinstance(part, str) and _safe_part(part) for part in parts):
        shown = repr(name) if len(repr(name)) <= 80 else repr(name)[:77] + "..."
        raise UserError(f"{what} {shown} cannot be used as a name on disk: give it a plain name")
    return name


def _safe_part(part: str) -> bool:
    if part in ("", ".", "..") or not part.isprintable() or re.match(r"[A-Za-z]:", part):
        return False
    return not set("/\\") & set(part) and len(part.encode()) <= 255


@dataclass(frozen=True)
class Manifest:
    """What ``MANIFEST.sha256`` says."""

    kind: str | None
    """One of ``KINDS``; None without the mark."""
    digests: Mapping[str, str]
    """Hex sha256 of every file by its name relative to the folder."""
    made_from: Mapping[str, str] = field(default_factory=dict)
    """What the folder was made from: a word for each part, such as ``data``, and its hex sha256."""

    @classmethod
    def parse(cls, data: bytes, where: Path | str, remedy: str = "restore it or use another step") -> Manifest:
        """Read a manifest's bytes. Raises UserError naming ``where``: malformed, empty, or with unsafe names."""
        try:
            lines = data.decode().split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is corrupt: it is not text; {remedy}") from error
        kind = lines[0].removeprefix(_MARK) if lines[0].startswith(_MARK) else None
        if kind in KINDS:
            body, seal = data[: data.rfind(_SEAL)], data[data.rfind(_SEAL) :]
            if seal != _seal(body):
                raise UserError(f"{where} is corrupt: its last line is not the sha256 of those above; {remedy}")
            lines = body.decode().split("\n")[1:]
        digests: dict[str, str] = {}
        made_from: dict[str, str] = {}
        for line in lines:
            found = _LINE.fullmatch(line)
            if kind in KINDS and not digests and (source := _SOURCE.fullmatch(line)) and source[1] not in made_from:
                made_from[source[1]] = source[2]
            elif found and found[2] not in digests:
                digests[safe_name(found[2], f"{where}: file name", nested=True)] = found[1]
            elif line:
                raise UserError(f"{where} is corrupt: a line is malformed or repeated; {remedy}")
        if not digests:
            raise UserError(f"{where} is corrupt: it lists no file; {remedy}")
        return cls(kind, digests, made_from)

    @classmethod
    def read(cls, folder: Path, remedy: str = "restore it or use another step") -> Manifest:
        """The manifest of a folder. Raises UserError when it is missing or as ``parse`` does."""
        file = Path(folder) / MANIFEST
        if not file.is_file():
            raise UserError(f"{folder} has no {MANIFEST}: it is incomplete; {remedy}")
        return cls.parse(file.read_bytes(), file, remedy)

    def data(self) -> bytes:
        """The bytes of the file, lines sorted by name; with a mark, the last one is the sha256 of those above.

        ``sha256sum -c`` reads them.
        """
        mark = f"{_MARK}{self.kind}\n" if self.kind else ""
        mark += "".join(f"# made from {part} {digest}\n" for part, digest in sorted(self.made_from.items()))
        names = sorted(safe_name(name, "file name", nested=True) for name in self.digests)
        body = (mark + "".join(f"{self.digests[name]}  {name}\n" for name in names)).encode()
        return body + _seal(body) if self.kind else body


def _seal(body: bytes) -> bytes:
    return _SEAL + hashlib.sha256(body).hexdigest().encode() + b"\n"


def write_manifest(folder: Path, kind: str, made_from: Mapping[str, str] | None = None) -> None:
    """Write ``MANIFEST.sha256`` of every file below ``folder``, with the mark of ``kind`` and ``made_from``."""
    folder = Path(folder)
    files = (file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    digests = {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}
    write_bytes(folder / MANIFEST, Manifest(kind, digests, made_from or {}).data())


def verify_manifest(folder: Path) -> Manifest:
    """Check every file against the folder's manifest, and return it. Raises UserError naming the first that differs."""
    folder = Path(folder)
    manifest = Manifest.read(folder)
    for name, digest in manifest.digests.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing though {MANIFEST} lists it; use another step or copy it again")
        if (found := sha256_file(file)) != digest:
            raise UserError(
                f"{file} is corrupt: {MANIFEST} expects sha256 {digest[:12]}, found {found[:12]}; restore it or use "
                "another step"
            )
    return manifest


def require_space(path: Path, size: int) -> None:
    """Raise UserError unless the file system of ``path`` has ``size`` bytes free."""
    folder = Path(path)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"not enough space for {path}: {size / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            "free some space or choose another --out"
        )
