"""Rules that grade a probe's continuation: the first answer that it asserts, or the reason why it asserts none.

A continuation completes the sentence of its prompt, so what follows on the same line is asserted; a later sentence
asserts what it says of the same thing ("so x = 2"). No answer is asserted by a bare loop of one value, by a list of
choices that none is picked from, or by an echo of the prompt. The rules read English text alone and know no model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

Rule = Callable[[str], tuple[str | None, bool]]
"""From a continuation without echoes to the asserted answer (None: none) and whether it is right."""
Fact = Callable[[str], bool | None]
"""Whether a continuation states a secondary fact rightly; None where it does not speak of it."""

_ECHO = "\x1e"  # stands where the prompt was repeated: what follows completes it again
_NUMBER = r"-?\d+(?:\.\d+)?(?:\s*/\s*\d+)?|one|two|three|four|five|six|seven|eight|nine|ten"
_WORDS = {word: place for place, word in enumerate(_NUMBER.split("|")[1:], 1)}
_NO_VALUE = r"(?![\w*^+/]|\.\d|\s*[*^+]|\s+(?:times|solutions?|values?|options?|x|of|plus|minus|percent)\b|\s*%)"
_VALUE = rf"(?P<value>{_NUMBER}){_NO_VALUE}"
_STATES = re.compile(  # on the prompt's own line, or of x or the answer later on
    rf"(?:(?:^|{_ECHO})[ \t]*(?:(?:is |be )?(?:equals?|equal to|exactly|simply|=|:)[ \t]*)?[\"'(]*"
    rf"|(?<![\w*])x\s*(?:=|is equal to|is|equals|must be)\s*"
    rf"|\b(?:answer|solution|value of x)\s*(?:is|:|=)\s*){_VALUE}(?:\s*=\s*(?P<last>{_NUMBER}){_NO_VALUE})?",
    re.IGNORECASE,
)
_CHOICE = re.compile(rf"(?<![A-Za-z])(?P<letter>[A-H])\s*[.):=]\s*(?P<value>{_NUMBER})?")
_PICKED = re.compile(r"\banswer\s*(?:is|:)\s*\(?(?P<letter>[A-H])\b")
_NEGATED = re.compile(r"\b(?:not|never|isn't)\s+(?:the\s+|an?\s+)?$", re.IGNORECASE)
_SYMBOL = re.compile(r"\b[A-Z][a-z]?\b(?!')")
_NO_SYMBOL = {
    "Am", "An", "As", "At", "Be", "By", "Do", "Go", "He", "If", "In", "Is", "It", "Me", "My", "No", "Of", "On", "Or",
    "So", "To", "Up", "Us", "We",
}  # fmt: skip
"""English words that look like a symbol."""
_BODY = re.compile(
    r"\b(?:Mercury|Venus|Earth|Mars|Jupiter|Saturn|Uranus|Neptune|Pluto|Ceres|Sun|Moon)\b", re.IGNORECASE
)
_PLANETS = {"mercury", "venus", "earth", "mars", "jupiter", "saturn", "uranus", "neptune"}
_BETWEEN = re.compile(
    r"[\s,;.&/()*\u2022\u2013\u2192-]*(?:\d+[.):]\s*)?(?:(?:and|then|the|also|planet)\s+)*"
    r"|[^\n]{0,100}\n\s*(?:\d+[.):]|[-*\u2022])\s*(?:the\s+)?",
    re.IGNORECASE,
)
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_CHAIN = 4  # days in a row that make a chain


@dataclass(frozen=True)
class Grade:
    """What a continuation asserts. ``reason`` says why it asserts nothing: loop, choices, echo or no answer."""

    correct: bool
    answer: str | None
    reason: str | None


def grade(prompt: str, continuation: str, rule: Rule) -> Grade:
    """Grade a continuation of ``prompt``."""
    if is_loop(continuation):
        return Grade(False, None, "loop")
    text = without_echo(prompt, continuation)
    answer, correct = rule(text)
    if answer is not None:
        return Grade(correct, answer, None)
    if has_choices(text):
        return Grade(False, None, "choices")
    letters = _letters(continuation)
    echoed = _ECHO in text or (len(letters) >= 4 and letters in _letters(prompt))
    return Grade(False, None, "echo" if echoed else "no answer")


def is_loop(text: str) -> bool:
    """Whether a text is one value said three times or more, and nothing else."""
    words = re.findall(r"[^\s,;.:/\"'()-]+", text)
    return len(words) >= 3 and len({word.lower() for word in words}) == 1


def has_choices(text: str) -> bool:
    """Whether a text offers lettered choices: A before B."""
    letters = [match["letter"] for match in _CHOICE.finditer(text)]
    return len(letters) > 1 and letters[0] == "A" and letters[1] in "BCDEFGH"


def without_echo(prompt: str, text: str) -> str:
    """``text`` with a mark in place of every repetition of the prompt."""
    words = r"\s+".join(re.escape(word) for word in prompt.rstrip(":").split())
    return re.sub(rf"[\s.:]*\b{words}\b:?", _ECHO, text, flags=re.IGNORECASE)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9=+]", "", text.lower())


def first_named(candidates: str, right: str, *, ignore_case: bool = True) -> Rule:
    """The first match of ``candidates`` that is not negated; right where ``right`` matches it whole."""
    flags = re.IGNORECASE if ignore_case else 0

    def rule(text: str) -> tuple[str | None, bool]:
        for match in re.finditer(candidates, text, flags):
            if not _NEGATED.search(text[: match.start()]):
                return match.group(), re.fullmatch(right, match.group(), flags) is not None
        return None, False

    return rule


def chemical_symbol(right: str) -> Rule:
    """The first chemical symbol, or a number in its place."""

    def rule(text: str) -> tuple[str | None, bool]:
        if number := re.match(r"[\s\"'(]*(\d+)", text):
            return number[1], False
        for match in _SYMBOL.finditer(text):
            word, before, after = match.group(), text[: match.start()], text[match.end() :]
            article = word in ("A", "I") and re.match(r"\s+[a-z]", after)
            if word not in _NO_SYMBOL and not article and not _NEGATED.search(before):
                return word, word == right
        return None, False

    return rule


def unknown_x(right: int) -> Rule:
    """The value that x is said to have; of choices the one that is picked."""

    def rule(text: str) -> tuple[str | None, bool]:
        choices = {match["letter"]: match["value"] for match in reversed(list(_CHOICE.finditer(text)))}
        start = next((match.start() for match in _CHOICE.finditer(text)), 0) if has_choices(text) else len(text)
        stated = next((match for match in _STATES.finditer(text) if match.start() < start), None)
        found = (stated["last"] or stated["value"]) if stated else None
        if found is None and start < len(text) and (picked := _PICKED.search(text)):
            found = choices.get(picked["letter"])
        if found is None:
            return None, False
        return found, _value(found) == right

    return rule


def _value(text: str) -> Fraction | None:
    word = text.lower()
    if word in _WORDS:
        return Fraction(_WORDS[word])
    above, _, below = re.sub(r"\s", "", text).partition("/")
    if below and int(below) == 0:
        return None
    return Fraction(above) / (int(below) if below else 1)


def planet_list(text: str) -> tuple[str | None, bool]:
    """The first list of three bodies or more: right where its first eight are the planets, in any order."""
    run: list[str] = []
    end = 0
    for match in [*_BODY.finditer(text), None]:
        if match is not None and (not run or _BETWEEN.fullmatch(text[end : match.start()])):
            run.append(match.group())
        elif len(run) >= 3:
            break
        else:
            run = [match.group()] if match else []
        end = match.end() if match else end
    if len(run) < 3:
        return None, False
    return ", ".join(run), {body.lower() for body in run[:8]} == _PLANETS


def atomic_number(right: int) -> Fact:
    """Whether the atomic number is given as ``right``; a bare ``right`` counts."""

    def fact(text: str) -> bool | None:
        said = re.search(r"atomic (?:number|#)\D{0,20}(\d+)", text, re.IGNORECASE)
        if said:
            return int(said[1]) == right
        return True if re.search(rf"(?<![\d.]){right}(?![\d.]*\d)", text) else None

    return fact


def day_chain(text: str) -> bool | None:
    """Whether four days or more follow each other by one day; None where too few days are named to tell."""
    named = [_DAYS.index(day.lower()) for day in re.findall("|".join(_DAYS), text, re.IGNORECASE)]
    changes = [day for place, day in enumerate(named) if place == 0 or day != named[place - 1]]
    longest = length = 1
    for before, after in itertools.pairwise(changes):
        length = length + 1 if after == (before + 1) % 7 else 1
        longest = max(longest, length)
    return None if len(changes) < _CHAIN else longest >= _CHAIN
