"""What tells of a changed byte: JSON with the sha256 of its content, lines with a checksum, files compared once.

A seal tells of faults of disks and of slips of the hand, not of an adversary: who can write a file can seal it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.files import read_json, sha256_file, write_json

SEAL = "sha256"
"""Key of the digest in sealed JSON."""
_CHECKSUM = "crc32"
_compared: dict[str, tuple[tuple[int, int, int], str]] = {}  # path: what tells of a change, and the sha256 then


def content_sha256(value: Any) -> str:
    """Hex sha256 of JSON values, whatever the order of keys and the white space of the file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as JSON will give it back, with its own digest as the last key."""
    content = {key: part for key, part in json.loads(json.dumps(dict(value), allow_nan=False)).items() if key != SEAL}
    return {**content, SEAL: content_sha256(content)}


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically write ``value`` as indented JSON with its seal."""
    write_json(path, sealed(value))


def read_sealed(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Content of sealed JSON, without the seal.

    Raises UserError that names ``what`` and the file, and ends with ``remedy``: missing, no JSON object, without a
    seal, or changed since it was sealed.
    """
    content = read_json(path, what)
    if not isinstance(content, dict):
        raise UserError(f"{what} {path} is no JSON object; {remedy}")
    expected = content.pop(SEAL, None)
    if expected is None:
        raise UserError(f"{what} {path} carries no {SEAL} of its content; {remedy}")
    if (found := content_sha256(content)) != expected:
        raise UserError(
            f"{what} {path} was changed after it was written: its sha256 is {found[:12]}, expected "
            f"{str(expected)[:12]!a}; {remedy}"
        )
    return content


def require_sha256(file: Path, expected: str, what: str, remedy: str) -> None:
    """Raise UserError, naming ``what``, the file, both digests and ``remedy``, unless the file has this sha256.

    A file that this process compared before is read again only if its size, time or inode has changed since.
    """
    try:
        state = os.stat(file)
        facts = state.st_size, state.st_mtime_ns, state.st_ino
        name = os.path.abspath(file)
        known, found = _compared.get(name, (None, ""))
        if known != facts:
            found = sha256_file(file)
            _compared[name] = facts, found
    except FileNotFoundError as error:
        raise UserError(f"{what} {file} is missing; {remedy}") from error
    except OSError as error:
        raise UserError(f"{what} {file} cannot be read ({error.strerror}); {remedy}") from error
    if found != expected:
        raise UserError(f"{what} {file} is corrupt: its sha256 is {found[:12]}, expected {expected[:12]}; {remedy}")


def require_made_from(found: Mapping[str, str], expected: Mapping[str, str], what: Path, remedy: str) -> None:
    """Raise UserError, naming the part and both digests, unless ``what`` was made from what is ``expected``."""
    for part, digest in expected.items():
        if (made := found.get(part)) != digest:
            known = f"{part} {made[:12]}" if made else f"no {part}"
            raise UserError(f"{what} was made from {known}, this run has {part} {digest[:12]}: {remedy}")


def sealed_line(record: Mapping[str, Any]) -> str:
    """A line of a ``.jsonl`` file, without the line break: the record with the CRC-32 of its text as the last key."""
    text = json.dumps(dict(record))
    checksum = f'"{_CHECKSUM}": "{zlib.crc32(text.encode()):08x}"'
    return f"{text[:-1]}, {checksum}}}" if record else f"{{{checksum}}}"


def open_line(line: bytes) -> dict[str, Any]:
    """The record of a sealed line. Raises ValueError saying how it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    if not isinstance(record, dict) or _CHECKSUM not in record:
        raise ValueError(f"it carries no {_CHECKSUM}")
    expected = record.pop(_CHECKSUM)
    if (found := f"{zlib.crc32(json.dumps(record).encode()):08x}") != expected:
        raise ValueError(f"its {_CHECKSUM} is {found}, expected {str(expected)[:8]!a}")
    return record
