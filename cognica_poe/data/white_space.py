"""Very long white space in a text, found in linear time: tiktoken's regular expressions run out of stack on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

LONG_SPACE = 20000
"""Characters of white space in a row that are encoded apart."""
SPACES = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""What the split pattern's ``\\s`` matches (Unicode's White_Space; ``str.isspace`` has four more)."""
_RUN = re.compile(f"[{SPACES}]*")
_LINE_ENDS = "\r\n"


def long_spaces(text: str) -> Iterator[tuple[int, int]]:
    """``(start, end)`` of every run of at least ``LONG_SPACE`` characters of white space, in order.

    Only every ``LONG_SPACE``-th character is looked at, and what is around those that are white space: a search for the
    runs themselves would be quadratic where they are just too short.
    """
    probe, done = 0, 0
    while probe < len(text):
        if text[probe] in SPACES:
            near = text[max(done, probe - LONG_SPACE) : probe]
            start = probe - (len(near) - len(near.rstrip(SPACES)))
            run = _RUN.match(text, probe)
            end = run.end() if run else probe
            if end - start >= LONG_SPACE:
                yield start, end
            done = end
        probe = max(probe, done - 1) // LONG_SPACE * LONG_SPACE + LONG_SPACE


def cut_at_long_space(text: str, keeps_line_ends: Callable[[str], bool]) -> Iterator[tuple[str, bool]]:
    """Parts of ``text`` that can be encoded one by one, each with whether it is part of very long white space.

    The cuts are at borders of the split pattern's own words. Of white space it takes all up to the last line end as one
    word, the rest but for the last character as another; that one goes to what follows. Line ends right behind a
    punctuation mark are part of the word before: ``keeps_line_ends(character)`` says whether a character is one.
    """
    done = 0
    for start, end in long_spaces(text):
        if start and text[start] in _LINE_ENDS and keeps_line_ends(text[start - 1]):
            start = end - len(text[start:end].lstrip(_LINE_ENDS))
        lines = start + len(text[start:end].rstrip(SPACES.replace("\r", "").replace("\n", "")))
        rest = end if end == len(text) else max(lines, end - 1)
        for first, last, is_space in ((done, start, False), (start, lines, True), (lines, rest, True)):
            if first < last:
                yield text[first:last], is_space
        done = rest
    if done < len(text):
        yield text[done:], False
