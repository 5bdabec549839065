import dataclasses

import pytest

from cognica_poe.data.cleaning.languages import CHECKED, speaks
from cognica_poe.data.cleaning.rules import Cleaning, symbol_share
from cognica_poe.recipe.fields import CleaningRecipe

PROSE = {
    "en": "It was the best of times, it was the worst of times, it was the age of wisdom, and all had been there.",
    "es": "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo.",
    "fr": "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient si"
    " vite que je n'avais pas le temps de me dire : je m'endors. Et, une demi-heure après, la pensée me réveillait.",
    "de": "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett verwandelt.",
    "it": "Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura, che la diritta via era smarrita.",
    "pt": "Não tive filhos, não transmiti a nenhuma criatura o legado da nossa miséria. Ao verme que me roeu.",
    "nl": "Ik ben makelaar in koffie, en woon op de Lauriergracht. Het is mijn gewoonte niet, om romans te lezen.",
    "ko": "모든 국민은 인간으로서의 존엄과 가치를 가지며, 행복을 추구할 권리를 가진다. " * 4,
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で" * 3,
    "zh": "道可道非常道。名可名非常名。無名天地之始有名萬物之母。故常無欲以觀其妙常有欲以觀其徼。" * 3,
}


@pytest.mark.parametrize("language", PROSE)
def test_prose_is_in_its_language_and_in_no_other(language):
    assert [other for other in sorted(CHECKED) if speaks(2 * PROSE[language], other)] == [language]


def test_what_cannot_be_checked_passes():
    assert speaks("short", "ko") and speaks(PROSE["en"], "und") and speaks("x = 1\n" * 90, "code")
    assert not speaks("0123456789 ABCD " * 20, "en")


def test_symbol_share():
    assert symbol_share("") == symbol_share("plain words 12\n") == symbol_share("नमस्ते العربية") == 0
    assert symbol_share("a-b!") == 0.5 and symbol_share("\x01\U0001f600\ue000") == 1


CASES = [
    ({}, "fine", "en", None),
    ({}, " \n", "en", "empty"),
    ({}, "a\0b", "en", "nul byte"),
    ({}, "a\ud800", "en", "not utf-8"),
    ({"min_chars": 5}, "four", "en", "too short"),
    ({"min_chars": 4}, "four", "en", None),
    ({"max_chars": 3}, "four", "en", "too long"),
    ({"max_chars": 4}, "four", "en", None),
    ({"max_symbol_share": 0.4}, "a-!-", "en", "symbols"),
    ({"max_symbol_share": 0.4}, "a-!-", "code", None),
    ({"check_language": True}, 2 * PROSE["fr"], "en", "other language"),
    ({"check_language": True}, 2 * PROSE["fr"], "fr", None),
    ({}, 2 * PROSE["fr"], "en", None),
]


@pytest.mark.parametrize(("changes", "text", "language", "reason"), CASES)
def test_every_rule_can_be_switched(changes, text, language, reason):
    assert Cleaning(**changes).problem(text, language) == reason


def test_the_fields_of_a_recipe_are_those_of_the_rules():
    assert dataclasses.asdict(CleaningRecipe()) == dataclasses.asdict(Cleaning())
    names = {field.name: field.type for field in dataclasses.fields(Cleaning)}
    assert names == {field.name: field.type for field in dataclasses.fields(CleaningRecipe)}
