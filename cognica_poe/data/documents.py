"""One document: a text, and where it comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A whole text of the corpus."""

    text: str
    """The text; never empty, no NUL, encodable as UTF-8."""
    source: str
    """Name of the source in the mix."""
    language: str
    """ISO 639-1 code, or ``code`` for program source."""
    origin: str
    """Where the text can be found, such as ``python3.11/Lib/json/decoder.py``; never an absolute path."""
    group: str = ""
    """Documents of one group stay on one side of the validation split. Empty: the document is its own group."""

    @property
    def group_key(self) -> str:
        """The group, or the origin where no group is named."""
        return self.group or self.origin


def text_problem(text: str) -> str | None:
    """Why ``text`` cannot be a document (``empty``, ``nul byte``, ``not utf-8``), or None if it can."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "nul byte"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # lone surrogates
            return "not utf-8"
    return None


def text_digest(text: str) -> bytes:
    """16 bytes that identify a text up to surrounding white space."""
    return hashlib.sha256(text.strip().encode()).digest()[:16]


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone: sha256, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
