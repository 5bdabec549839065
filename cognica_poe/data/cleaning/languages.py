"""Whether a text is in the language that it is said to be in: by its script, or by the most frequent words."""

from __future__ import annotations

import re

import numpy as np

from cognica_poe.data.cleaning.words import LETTER, code_points, kinds

_SAMPLE = 50_000  # characters looked at
_FEWEST_LETTERS = 100  # with fewer nothing can be said
_SCRIPTS = {  # language: blocks of its script, least share of the letters; pages about programs are half English
    "ko": (((0xAC00, 0xD7A3), (0x1100, 0x11FF), (0x3130, 0x318F)), 0.15),
    "ja": (((0x3040, 0x30FF),), 0.08),
    "zh": (((0x4E00, 0x9FFF), (0x3400, 0x4DBF)), 0.15),
}
_LATIN = ((0x41, 0x24F),)
_FREQUENT = {  # the lines of other languages hold no typing mistakes
    "en": "the of and to in a is that for it was as with he be on i his at by had not are but"
    " from or have an they which you were her she this all will one we there their been"
    " has who if so no when what would",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o"
    " pero sus le ha me si sin sobre este ya entre cuando todo esta ser son dos también"  # codespell:ignore
    " fue había era muy hasta desde",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se"
    " ce il sont la avec son ou mais comme on lui nous cette ces ont été aux elle être"
    " fait leur tout vous je",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als"  # codespell:ignore
    " auch es an werden aus er hat dass sie nach wird bei einer um am sind noch wie einem"  # codespell:ignore
    " über einen so zum war",
    "it": "di e il la che in a per un è del non una i le con si da della sono dei al come più o"
    " anche lo ha gli ma alla nel delle questo se su era dal nella loro",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi"
    " ao ele das tem à seu sua ou ser quando muito há nos já está eu também",  # codespell:ignore
    "nl": "de van het een en in is dat op te zijn met voor die niet aan er om ook als dan maar"  # codespell:ignore
    " bij of uit nog naar heeft hij ze wordt door over was",
}
_FREQUENT_WORDS = {language: frozenset(words.split()) for language, words in _FREQUENT.items()}
_LEAST_FREQUENT = 0.08
"""Share of frequent words below which a text is no prose of a language; prose has 0.3 to 0.5."""
_WORD = re.compile(r"[^\W\d_]+")
CHECKED = frozenset((*_SCRIPTS, *_FREQUENT))
"""Languages that can be checked (ISO 639-1); a text in any other passes."""


def speaks(text: str, language: str) -> bool:
    """False if ``text`` is not in ``language``; true for languages not in :data:`CHECKED`, and for a few words.

    Japanese must hold kana, Chinese few of them; languages in Latin letters are told apart by their frequent words.
    """
    if language not in CHECKED:
        return True
    sample = text[:_SAMPLE]
    codes = code_points(sample)
    codes = codes[kinds()[codes] == LETTER]
    if len(codes) < _FEWEST_LETTERS:
        return True
    if language in _SCRIPTS:
        blocks, least = _SCRIPTS[language]
        return _share(codes, blocks) >= least and (language != "zh" or _share(codes, _SCRIPTS["ja"][0]) < 0.05)
    if _share(codes, _LATIN) < 0.5:
        return False
    words = _WORD.findall(sample.lower())
    shares = {
        name: sum(word in frequent for word in words) / max(1, len(words)) for name, frequent in _FREQUENT_WORDS.items()
    }
    return shares[language] >= _LEAST_FREQUENT and shares[language] >= 0.9 * max(shares.values())


def _share(codes: np.ndarray, blocks: tuple[tuple[int, int], ...]) -> float:
    return sum(float(((codes >= low) & (codes <= high)).mean()) for low, high in blocks)
