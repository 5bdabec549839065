"""Files on disk: atomic writes, sha256 manifests, free-space checks.

Everything a run leaves behind goes through here, so that a crash, a full disk or a kill never leaves half a file
under its final name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cognica_poe.errors import UserError

MANIFEST = "MANIFEST.sha256"
_PARTIAL = ".partial-"
_REPLACED = ".replaced-"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_PARTIAL)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def write_json(path: Path, value: Any) -> None:
    """Atomically write ``value`` as indented JSON (NaN refused: a record holds numbers or null)."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str = "file") -> Any:
    """Read JSON. Raises UserError that names ``what`` when it is missing or malformed."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{what} not found: {path}") from error
    except PermissionError as error:
        raise UserError(f"{what} {path} may not be read: change its permissions") from error
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{what} {path} is not valid JSON ({error}); restore it or make it again") from error


@contextlib.contextmanager
def atomic_folder(path: Path, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` (replacing it) once the block ends without an exception.

    All files are fsynced; with ``manifest`` a sha256 manifest is written last. On failure nothing stays behind.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{_PARTIAL}{path.name}-"))
        try:
            yield partial
            if manifest:
                write_manifest(partial)
            for file in sorted(partial.rglob("*")):
                _fsync(file)
            _fsync(partial)
            partial.chmod(0o755)
            if path.exists():  # rename cannot replace a folder that holds files
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=_REPLACED))
                os.replace(path, old / path.name)
                try:
                    os.replace(partial, path)
                except BaseException:
                    os.replace(old / path.name, path)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(partial, path)
            _fsync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_partials(folder: Path) -> None:
    """Delete what a killed process left half-written in ``folder``, and put back what it was about to replace."""
    if Path(folder).is_dir():
        for replaced in Path(folder).glob(f"{_REPLACED}*"):
            for old in replaced.iterdir():
                if not (Path(folder) / old.name).exists():
                    os.replace(old, Path(folder) / old.name)
            shutil.rmtree(replaced, ignore_errors=True)
        for leftover in Path(folder).glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def manifest_text(folder: Path) -> str:
    """``sha256sum`` lines of every file below ``folder`` except the manifest itself, sorted by name."""
    folder = Path(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return "".join(f"{sha256_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)


def write_manifest(folder: Path) -> None:
    """Write ``MANIFEST.sha256``, readable by ``sha256sum -c``."""
    write_bytes(Path(folder) / MANIFEST, manifest_text(folder).encode())


def verify_manifest(folder: Path) -> None:
    """Check every file against the folder's manifest. Raises UserError naming the first file that differs."""
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder} has no {MANIFEST}: it is incomplete; use another step")
    for line in manifest.read_text().splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing though {MANIFEST} lists it; use another step or copy it again")
        if sha256_file(file) != digest:
            raise UserError(f"{file} is corrupt: its sha256 is not that in {MANIFEST}; restore it or use another step")


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
