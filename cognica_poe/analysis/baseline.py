"""What a general compressor needs per byte of the validation text: the bar a language model has to clear.

``xz_bpb`` compresses the validation text alone. ``xz_primed_bpb`` lets the compressor read the training text first,
with a window over all of it: the size of both together minus that of the training text. A model that only repeats what
it has read cannot beat the second by much.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from typing import Any

from cognica_poe.errors import UserError

MAX_PRIMING_BYTES = 200_000_000
"""Of training text: xz takes about 11 times the memory of what it compresses."""
_LARGEST_WINDOW = 1536 * 2**20  # liblzma's limit
_SMALLEST_WINDOW = 2**16
_SEPARATOR = b"\n"


def xz_baseline(
    train_texts: Iterable[str], val_texts: Iterable[str], *, max_priming_bytes: int = MAX_PRIMING_BYTES
) -> dict[str, Any]:
    """Bits per byte of validation text under xz at its strongest preset (9, extreme).

    Documents are joined by a line break, which is not counted as text. Of a longer training text the last
    ``max_priming_bytes`` are read, and the result says so. Returns ``xz_bpb``, ``xz_primed_bpb``, ``val_bytes``,
    ``train_bytes`` (read for priming), ``train_truncated`` and ``method``. Raises UserError without validation text.
    """
    val, val_bytes = _joined(val_texts)
    if not val_bytes:
        raise UserError("no validation text to compress; build the data again with a validation split")
    train, _ = _joined(train_texts, max_priming_bytes)
    kept = train[-max_priming_bytes:] if max_priming_bytes else b""
    primed = _compressed(kept + _SEPARATOR + val) - _compressed(kept + _SEPARATOR)
    return {
        "xz_bpb": 8 * _compressed(val) / val_bytes,
        "xz_primed_bpb": 8 * primed / val_bytes,
        "val_bytes": val_bytes,
        "train_bytes": len(kept),
        "train_truncated": len(kept) < len(train),
        "method": "lzma2 preset 9 extreme, window over all of the text",
    }


def _joined(texts: Iterable[str], last: int | None = None) -> tuple[bytes, int]:
    """(documents joined, bytes of text without separators); with ``last``, at least that many bytes from the end."""
    joined, size = bytearray(), 0
    for text in texts:
        data = text.encode()
        size += len(data)
        joined += data if not joined else _SEPARATOR + data
        if last is not None and len(joined) > 2 * last + 1:
            del joined[: len(joined) - last - 1]  # one more than asked for tells that text was left out
    return bytes(joined), size


def _compressed(data: bytes) -> int:
    """Bytes of the raw LZMA2 stream, without container. Takes about 11 times the memory of ``data``."""
    window = min(_LARGEST_WINDOW, max(_SMALLEST_WINDOW, len(data)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))
