"""What publishing changes in a repository: files that we wrote there, by its manifest with our mark; others stay."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from cognica_poe.errors import UserError

_SHOWN = 5


@dataclass(frozen=True)
class Change:
    """What has to happen to a revision so that it holds a tree. Names are relative paths with ``/``."""

    put: list[str]
    """Files that it lacks or holds with other content."""
    remove: list[str]
    """Files of an older release of ours that the tree has no more, and such of ``foreign`` as have another name."""
    foreign: list[str]
    """Files in the way that we did not write, or that were changed since."""

    def __bool__(self) -> bool:
        return bool(self.put or self.remove or self.foreign)


def change_of(
    tree: Collection[str], held: Collection[str], *, same: Callable[[str], bool], ours: Callable[[str], bool]
) -> Change:
    """The change from the files ``held`` to those of ``tree``.

    ``same(name)``: a file of both has the content of the tree already; ``ours(name)``: we wrote the held file as it is.
    A name in the way is equal, differs in case or normal form only (one file on many disks), or is a folder of the
    other's.
    """
    wanted = {_folded(name) for name in tree}
    folders = {parent for name in tree for parent in _parents(_folded(name))}
    put = [name for name in sorted(tree) if name not in held or not same(name)]
    foreign, remove = [], []
    for name in sorted(held):
        if name in tree and name not in put:
            continue
        plain = _folded(name)
        in_the_way = plain in wanted or plain in folders or any(parent in wanted for parent in _parents(plain))
        mine = ours(name)
        if in_the_way and not mine:
            foreign.append(name)
        if name not in tree and (mine or in_the_way):
            remove.append(name)
    return Change(put, remove, foreign)


def require_ours(change: Change, replace: bool, where: str) -> str | None:
    """Raise UserError naming the files in the way; with ``replace``, return a line that names them instead."""
    if not change.foreign:
        return None
    more = f" and {len(change.foreign) - _SHOWN} more" if len(change.foreign) > _SHOWN else ""
    names = ", ".join(name if name.isprintable() else ascii(name) for name in change.foreign[:_SHOWN]) + more
    if replace:
        return f"publish: {names} of {where} is replaced, though not written by cognica-poe"
    advice = "move it away, or add --replace to replace it"
    raise UserError(
        f"{names} of {where} was not written by cognica-poe, or changed since; nothing is published: {advice}"
    )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def _parents(name: str) -> list[str]:
    return [parent.as_posix() for parent in PurePosixPath(name).parents if parent.as_posix() != "."]
