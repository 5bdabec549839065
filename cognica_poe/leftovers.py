"""Half-written files and folders: each has a living owner, and what a dead one left is removed.

The owner holds the kernel's lock (``flock``) on its file, which ends with the process however that ends. So whoever can
lock a leftover knows that nobody writes it any more. Where a file system knows no such locks, leftovers are kept.

    .partial-cognica-poe-XXXX            a file in the making, locked itself
    .partial-cognica-poe-NAME/owner      a folder in the making: the locked file, saying who writes
                              new/NAME   what becomes NAME
                              old/NAME   what stood there before, put back should the owner die between both
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from cognica_poe.errors import UserError

PREFIX = ".partial-cognica-poe-"
"""Names of what is half-written."""
_OWNER = "owner"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.EBADF)
_owned: set[Path] = set()
"""Files and folders in the making of this process."""


class _Shield:
    """Whether the main thread is making something that it has not noted as its own yet."""

    depth = 0
    late: Callable[[], None] | None = None
    """What an interruption of that moment does once it is over."""


shield = _Shield()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """An interruption of the main thread waits for the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    shield.depth += 1
    try:
        yield
    finally:
        shield.depth -= 1
        if not shield.depth and (late := shield.late):
            shield.late = None
            late()


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file. False when another process, or another part of this one, has it; None when none can."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise


def is_still(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names the open file: its last owner may have removed it before it could be locked."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sign(descriptor: int) -> None:
    """Write into a locked file who has it."""
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)


def signature(path: Path) -> str:
    """Who has a locked file, in words."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            said = file.readline(200).strip()
    except OSError:
        said = ""
    return said if said.startswith("process ") and said.isprintable() else "another process"


@contextlib.contextmanager
def partial_file(folder: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Yield a new file of ``folder``, open for writing, and its path; it is removed unless the block renamed it."""
    while True:
        with _undisturbed():
            descriptor, name = tempfile.mkstemp(dir=folder, prefix=PREFIX)
            path = Path(name)
            _owned.add(path)
        if try_lock(descriptor) is None or is_still(path, descriptor):
            break
        os.close(descriptor)  # taken for a leftover before it could be locked
    try:
        with os.fdopen(descriptor, "wb") as file:
            try:
                yield file, path
            finally:
                path.unlink(missing_ok=True)
    finally:
        _owned.discard(path)


@contextlib.contextmanager
def partial_folder(path: Path, wait: float = 0.0) -> Iterator[Path]:
    """Yield the folder ``.partial-cognica-poe-NAME`` beside ``path`` of this name, for this process alone.

    It is removed in the end with what is in it. Raises UserError when another process has it and does not leave
    within ``wait`` seconds, at least one: somebody may be sweeping.
    """
    name = path.name if len(path.name.encode()) <= 200 else hashlib.sha256(path.name.encode()).hexdigest()
    outer, deadline = path.parent / f"{PREFIX}{name}", time.monotonic() + max(wait, 1.0)
    while (descriptor := _own(outer)) is None:
        if time.monotonic() >= deadline:
            raise UserError(f"{path} is being written by {signature(outer / _OWNER)}: wait for it to end")
        time.sleep(0.05)
    try:
        _clear(outer)  # of a dead process
        yield outer
    finally:
        _remove(outer)
        os.close(descriptor)
        _owned.discard(outer)


def _own(outer: Path) -> int | None:
    """As ``_take``, noted for the case that this process is interrupted."""
    with _undisturbed():
        if (descriptor := _take(outer)) is not None:
            _owned.add(outer)
        return descriptor


def _take(outer: Path) -> int | None:
    """Make ``outer`` this process' own; returns its open owner file, None when a living process has it."""
    while True:
        with contextlib.suppress(FileExistsError):
            outer.mkdir()
        try:
            descriptor = os.open(outer / _OWNER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # its last owner was removing it
        locked = try_lock(descriptor)
        if locked is False:
            os.close(descriptor)
            return None
        if is_still(outer / _OWNER, descriptor):
            sign(descriptor)
            return descriptor
        os.close(descriptor)


def is_being_written(path: Path) -> bool:
    """Whether a living process has ``path`` in the making."""
    owner = path.parent / f"{PREFIX}{path.name}" / _OWNER
    try:
        descriptor = os.open(owner, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)


def put_in_place(new: Path, path: Path, outer: Path) -> None:
    """Rename the finished folder ``new`` of ``outer`` to ``path``, replacing what stands there."""
    if not path.exists():
        os.replace(new, path)
        return
    old = outer / "old" / path.name  # rename cannot replace a folder that holds files
    old.parent.mkdir()
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise


def _clear(outer: Path) -> None:
    """Put back what was about to be replaced, then delete everything but the owner file."""
    if (outer / "old").is_dir():
        for old in (outer / "old").iterdir():
            if not os.path.lexists(outer.parent / old.name):
                os.replace(old, outer.parent / old.name)
    for entry in outer.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _OWNER:
            entry.unlink(missing_ok=True)


def _remove(outer: Path) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, OSError):
        _clear(outer)
        (outer / _OWNER).unlink(missing_ok=True)  # last: the next owner may come as soon as it is gone
        outer.rmdir()


def sweep(*folders: Path) -> None:
    """Delete what dead processes left half-written in ``folders``, and put back what they were about to replace.

    What a living process writes stays, and so does what is not ours: another user's, a link, a folder without owner.
    """
    for folder in map(Path, folders):
        if folder.is_dir():
            with os.scandir(folder) as entries:
                found = [Path(entry.path) for entry in entries if entry.name.startswith(PREFIX)]
            for path in found:
                with contextlib.suppress(OSError):  # gone meanwhile, or not to be touched
                    _sweep(path)


def _sweep(path: Path) -> None:
    status = os.lstat(path)
    if status.st_uid != os.getuid() or path.is_symlink():
        return
    if path.is_dir() and not (path / _OWNER).exists():
        path.rmdir()  # of a process that died at once; one that lives makes it again
        return
    locked = path / _OWNER if path.is_dir() else path
    descriptor = os.open(locked, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if try_lock(descriptor) and is_still(locked, descriptor):
            _remove(path) if path.is_dir() else path.unlink()
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder among the system's temporary ones; those that dead processes left are removed."""
    place = Path(tempfile.gettempdir())
    sweep(place)
    with partial_folder(place / f"{os.getpid()}-{os.urandom(6).hex()}") as outer:
        outer.chmod(0o700)
        (outer / "scratch").mkdir(mode=0o700)
        yield outer / "scratch"


def drop_owned() -> None:
    """Delete what this process has in the making: it is about to end without unwinding."""
    for path in list(_owned):
        if path.is_dir():
            _remove(path)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
