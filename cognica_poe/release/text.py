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
_MARKDOWN = set("\\`*_[]()<>#!|~$&@:^")
_LINE_START = re.compile(r"^(?:[-+=]|\d+(?=[.)]))")
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
    """``visible(text)`` for a place inside Markdown, a table cell included: every character that could be markup
    becomes a numeric entity, which CommonMark never reads as structure."""
    shown = visible(text, limit)
    for prefix in ("www.", "WWW."):  # a bare www. becomes a link in GitHub's dialect
        shown = shown.replace(prefix, prefix[:-1] + "\0")
    escaped = "".join(f"&#{ord(character)};" if character in _MARKDOWN else character for character in shown)
    escaped = escaped.replace("\0", "&#46;").strip()
    start = _LINE_START.match(escaped)  # a list or an underline, where the text opens a line
    if start:
        last = start.end() - 1
        escaped = f"{escaped[:last]}&#{ord(escaped[last])};{escaped[last + 1 :]}"
    return escaped or "&nbsp;"


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
    """A pipe table. ``align`` has one of ``l`` or ``r`` per column (default: first left, others right).

    Cells must be safe already: numbers from this module, or ``markdown_text``.
    """
    align = align or "l" + "r" * (len(header) - 1)
    rule = ["---:" if side == "r" else ":---" for side in align]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
