"""Users' mistakes as one line: how a message is shown, and what the system refuses about a path that a user gave."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cognica_poe.errors import UserError
from cognica_poe.locks import LOCK

LONGEST = 300
"""Characters of a message; what stands in the middle of a longer one is left out."""
_ADVICE = {
    errno.ENOENT: "give a path that exists",
    errno.EACCES: "change its permissions or choose another path",
    errno.EPERM: "change its permissions or choose another path",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EISDIR: "it is a folder; name a file",
    errno.EEXIST: "it is there already; choose another path",
    errno.ENOTEMPTY: "it is not empty; choose another path",
    errno.ELOOP: "its links lead in a circle; choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOSPC: "free some space or choose another path",
    errno.EDQUOT: "free some space or choose another path",
    errno.EFBIG: "free some space or choose another path",
    errno.EIO: "the disk fails; copy what you can and choose another path",
    errno.ENXIO: "it is no plain file; choose another path",
    errno.ETXTBSY: "a program runs from it; choose another path",
    errno.EINVAL: "choose another path",
}


def one_line(message: object) -> str:
    """``message`` in printable characters on one line of at most ``LONGEST`` characters."""
    text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in str(message))
    if len(text) <= LONGEST:
        return text
    tail = LONGEST // 2 - 5
    return f"{text[: LONGEST - tail - 5]} ... {text[-tail:]}"


@contextlib.contextmanager
def refusals(words: Sequence[str]) -> Iterator[None]:
    """Turn what the system refuses about the paths among ``words``, or for want of memory, into a UserError.

    Any other error of the system is a fault of the program and passes.
    """
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        path = next((name for name in (error.filename, error.filename2) if _given(name, words)), None)
        if advice is None or path is None:
            raise
        raise UserError(f"{os.fsdecode(path)}: {(error.strerror or '').lower()}; {advice}") from error
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("Symlink loop from "):  # what Path.resolve raises
            raise UserError(f"{str(error)[18:]}: its links lead in a circle; choose another path") from error
        if not isinstance(error, MemoryError) and not _out_of_memory(error):
            raise
        raise UserError("not enough memory: use smaller numbers, a smaller model or another machine") from error


def _given(name: object, words: Sequence[str]) -> bool:
    """Whether ``name`` is a path that the words name, above or below one, or beside it while it is written."""
    if not isinstance(name, str | bytes):
        return False
    path = Path(os.path.abspath(os.fsdecode(name)))
    values = [word.partition("=")[2] if word.startswith("-") else word for word in words]
    given = [Path(os.path.abspath(value.removeprefix("file:"))) for value in values if value]
    hidden = [folder for folder in (path, *path.parents) if folder.name.startswith((".partial-", LOCK))]
    if hidden:  # a lock, and what is being written, lie beside the place that they are for
        path = hidden[-1].parent
    return any(path in {place, *place.parents} or place in path.parents for place in given)


def _out_of_memory(error: RuntimeError) -> bool:
    """Of the processor's allocator, which has no exception of its own, or an accelerator's."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
