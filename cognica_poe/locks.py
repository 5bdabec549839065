"""One process per place: a run folder, a local hub. The lock is the kernel's and ends with the process."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cognica_poe.errors import UserError
from cognica_poe.files import disk_errors
from cognica_poe.leftovers import is_being_written, is_still, sign, signature, try_lock

LOCK = ".lock"
"""The file that the process which works in a folder has locked; it says who that is."""


@contextlib.contextmanager
def hold(folder: Path, *, wait: float = 0.0, log: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Keep ``folder`` for this process until the block ends; it is made where it is missing.

    Nothing is left of that: the file ``.lock`` goes, and so does a folder that was made and stayed empty. Where the
    file system knows no locks, ``log`` is told so. Raises UserError naming the process that has the folder and has not
    left after ``wait`` seconds.
    """
    folder = Path(folder)
    deadline = time.monotonic() + wait
    with disk_errors(folder):
        made = _make(folder)
        while (descriptor := _take(folder / LOCK, log)) is None:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{folder} is in use by {signature(folder / LOCK)}: wait for it to end, or choose another folder"
                )
            time.sleep(0.05)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        for empty in made:
            with contextlib.suppress(OSError):
                empty.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make ``folder``; returns what had to be made, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(file: Path, log: Callable[[str], None]) -> int | None:
    """Lock ``file``; returns it open, None when a living process has it."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        locked = try_lock(descriptor)
        if locked is False:
            os.close(descriptor)
            return None
        if is_still(file, descriptor):
            if locked is None:
                log(f"{file.parent}: this file system knows no locks; see to it that no other process works there")
            sign(descriptor)
            return descriptor
        os.close(descriptor)  # the last holder removed it before it could be locked


def is_held(folder: Path) -> bool:
    """Whether a living process keeps ``folder``; False where that cannot be known."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)


def hold_run_of(out: Path) -> contextlib.AbstractContextManager[None]:
    """``hold`` for the run folder that ``out``, its data, tokenizer or rows, lies in; nothing to hold elsewhere."""
    run = Path(os.path.abspath(out)).parent
    if (run / LOCK).exists() or (run / "recipe.json").is_file():
        return hold(run)
    return contextlib.nullcontext()


def require_settled(*folders: Path) -> None:
    """Raise UserError when another process is making one of ``folders``, which a run is about to read."""
    for folder in folders:
        if is_being_written(folder):
            raise UserError(f"another process is making {folder}: wait for it to end")
