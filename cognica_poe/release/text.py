"""Text of a release: escaping of what a model wrote, and one way of printing each kind of number.

A model's output is untrusted text that lands in Markdown and HTML, so nothing of it may act as markup, hide behind
control or bidirectional characters, or fill the page.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

MISSING = "\u2013"
"""What a table shows where a record has no number."""

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKUP = re.compile(
    r"[\\`*\[\]<|~$]"  # anywhere
    r"|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])"  # emphasis, which an underscore within a word is not
    r"|&(?=#?\w+;)"  # an entity
    r"|(?<=[A-Za-z]):(?=//)|(?<=\bwww)\.",  # what GitHub's dialect makes a link of
    re.IGNORECASE,
)
_OPENS_A_LINE = re.compile(r"^(?:\d{1,9}(?=[.)](?:\s|$))|(?=[-+](?:\s|$))|(?=[-=]{2}|[#>=]))")
_WIDEST = 60  # columns that a table pads to: beyond them a cell is text, which need not line up
_MARKS_IN_A_ROW = 4


def visible(text: object, limit: int = 240) -> str:
    """``text`` with nothing hidden in it: one line, control and format characters spelled out, at most ``limit``
    characters of the source and a mark where it was cut. Newlines become an arrow."""
    text = str(text)
    shown: list[str] = []
    marks = 0
    for character in text[:limit]:
        category = unicodedata.category(character)
        marks = marks + 1 if category.startswith("M") else 0
        if character == "\n":
            shown.append("↵ ")
        elif character == "\t":
            shown.append(" ")
        elif category in _HIDDEN or marks > _MARKS_IN_A_ROW:
            shown.append(f"U+{ord(character):04X}")
        else:
            shown.append(character)
    return "".join(shown) + (" …" if len(text) > limit else "")


def markdown_text(text: object, limit: int = 240) -> str:
    """``visible(text)`` for a place inside Markdown, a table cell included: what could be markup there gets a
    backslash, which CommonMark does not show, and the rest stays as it is, readable in a terminal too."""
    escaped = _MARKUP.sub(r"\\\g<0>", visible(text, limit).strip())
    start = _OPENS_A_LINE.match(escaped)  # a list, a heading or an underline, where the text opens a line
    return f"{escaped[: start.end()]}\\{escaped[start.end() :]}" if start else escaped


def markdown_code(value: object, limit: int = 240) -> str:
    """``visible(value)`` as a span of code, which may stand in a table cell."""
    return f"`{visible(value, limit).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def html_text(text: object, limit: int = 240) -> str:
    """``visible(text)`` for HTML text and quoted attributes."""
    return html.escape(visible(text, limit), quote=True)


def number(value: object, digits: int = 4) -> str:
    """A float with a fixed count of decimals; a dash for what is absent or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return MISSING
    return f"{value:.{digits}f}"


def signed(value: object, digits: int = 4) -> str:
    """As ``number`` with an explicit sign."""
    shown = number(value, digits)
    return shown if shown == MISSING or shown.startswith("-") else f"+{shown}"


def count(value: object) -> str:
    """An integer with thousands separators."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return MISSING
    return f"{round(value):,}"


def percent(value: object, digits: int = 1) -> str:
    """A fraction as a percentage."""
    shown = number(value * 100 if isinstance(value, (int, float)) else value, digits)
    return shown if shown == MISSING else f"{shown} %"


def interval(bounds: object, digits: int = 4) -> str:
    """``[low, high]`` of a pair, or a dash."""
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        return MISSING
    low, high = (number(bound, digits) for bound in bounds)
    return MISSING if MISSING in (low, high) else f"[{low}, {high}]"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A pipe table whose columns line up. ``align`` has one of ``l`` or ``r`` per column (default: first left, others
    right).

    Cells must be safe already: numbers from this module, ``markdown_text`` or ``markdown_code``.
    """
    align = align or "l" + "r" * (len(header) - 1)
    lines = [list(header), *(list(row) for row in rows)]
    widths = [min(_WIDEST, max(4, *map(_columns, column))) for column in zip(*lines, strict=True)]
    rule = ["-" * (width - 1) + ":" if side == "r" else ":" + "-" * (width - 1)
            for side, width in zip(align, widths, strict=True)]  # fmt: skip
    padded = [[_pad(cell, width, side) for cell, width, side in zip(line, widths, align, strict=True)]
              for line in lines]  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def _columns(cell: str) -> int:
    """Columns of a terminal that a cell takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in cell)
    return len(cell) + wide - sum(unicodedata.category(character) in ("Mn", "Me") for character in cell)


def _pad(cell: str, width: int, side: str) -> str:
    space = " " * max(0, width - _columns(cell))
    return space + cell if side == "r" else cell + space
