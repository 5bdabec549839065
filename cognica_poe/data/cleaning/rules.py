"""What a document must be to stay, and what it is dropped for: one function of a text, its language and the rules."""

from __future__ import annotations

from dataclasses import dataclass

from cognica_poe.data.cleaning.languages import speaks
from cognica_poe.data.cleaning.words import SYMBOL, code_points, kinds
from cognica_poe.data.documents import text_problem

TOO_SHORT, TOO_LONG = "too short", "too long"
OTHER_LANGUAGE, SYMBOLS = "other language", "symbols"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near duplicate"
VALIDATION_TEXT, EVALUATION_TEXT = "validation text", "evaluation text"


@dataclass(frozen=True)
class Cleaning:
    """Which documents are dropped. The fields are those of ``recipe.fields.CleaningRecipe``."""

    min_chars: int = 0
    """Fewest characters of a document."""
    max_chars: int | None = None
    """Most characters of a document."""
    check_language: bool = False
    """Drop what is not in the language that its source states (``data.cleaning.languages``)."""
    max_symbol_share: float = 1.0
    """Most characters that are no letter, digit, mark or white space, as a share; program source is not held to it."""
    exact_duplicates: bool = True
    """Drop all but one of equal texts."""
    near_duplicates: bool = False
    """Drop all but one of texts that share most of their words in order (``data.cleaning.minhash``)."""
    validation_leaks: bool = True
    """Drop training documents that hold validation text (``data.cleaning.leaks``)."""
    evaluation_texts: str | None = None
    """File or folder of texts that a model is evaluated on: drop documents that hold a run of their words."""
    evaluation_words: int = 13
    """Length of such a run in words."""

    def problem(self, text: str, language: str) -> str | None:
        """The reason for which a document is dropped by itself, or None; in the order of what is cheap.

        Reasons: ``empty``, ``nul byte``, ``not utf-8``, ``too short``, ``too long``, ``symbols``, ``other language``.
        """
        if unusable := text_problem(text):
            return unusable
        if len(text) < self.min_chars:
            return TOO_SHORT
        if self.max_chars is not None and len(text) > self.max_chars:
            return TOO_LONG
        if self.max_symbol_share < 1 and language != "code" and symbol_share(text) > self.max_symbol_share:
            return SYMBOLS
        if self.check_language and not speaks(text, language):
            return OTHER_LANGUAGE
        return None


def symbol_share(text: str) -> float:
    """Share of the characters of ``text`` that are no letter, digit, combining mark or white space."""
    return float((kinds()[code_points(text)] == SYMBOL).mean()) if text else 0.0
