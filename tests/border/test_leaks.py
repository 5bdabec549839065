"""No text that is held out is trained on, however it was copied; and what was not copied is kept."""

import random
import re

import pytest

from cognica_poe.data.cleaning.leaks import ValidationIndex
from cognica_poe.data.documents import unit_hash
from cognica_poe.data.sources import python_docs
from tests.data.corpora import texts

COPIES = 200


@pytest.fixture(scope="module")
def parted():
    """Texts of the embedded corpus, a tenth of its files held out: (training, validation)."""
    parts = ([], [])
    for document in python_docs.collect():
        parts[unit_hash(1, document.group_key) < 0.1].append(document.text)
    return parts


def chosen_paragraph(rng, text):
    """A paragraph of at least 100 letters, or the whole text where none is as long."""
    parts = [part for part in text.split("\n\n") if sum(map(str.isalnum, part)) >= 100]
    return rng.choice(parts) if parts else text


def paragraph(rng, text):
    return f"A title of its own\n\n{chosen_paragraph(rng, text)}"


def changed_word(rng, text):
    word = rng.choice(list(re.finditer(r"\w+", text)))
    return f"{text[: word.start()]}another{text[word.end() :]}"


def changed_case_and_spaces(rng, text):
    return rng.choice((" ", "  \n", "\t")).join(rng.choice((str.upper, str.lower, str.title))(text).split())


def one_paragraph_with_a_changed_word(rng, text):
    return f"A title of its own\n\n{changed_word(rng, chosen_paragraph(rng, text))}"


def paragraph_in_another_text(rng, text):
    around = texts(2, 1500, seed=rng.random())
    return "\n\n".join((around[0], chosen_paragraph(rng, text), around[1]))


def has_paragraph(text):
    return any(sum(map(str.isalnum, part)) >= 100 for part in text.split("\n\n"))


KINDS = {
    "exact": lambda rng, text: text,
    "one paragraph": paragraph,
    "one changed word": changed_word,
    "case and spaces": changed_case_and_spaces,
    "a paragraph with a changed word": one_paragraph_with_a_changed_word,
    "a paragraph in another text": paragraph_in_another_text,
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_of_validation_text_remains(kind, parted, capsys):
    rng = random.Random(kind)
    _, held = parted
    held = [text for text in held if has_paragraph(text)]
    index = ValidationIndex(held)
    copies = [KINDS[kind](rng, rng.choice(held)) for _ in range(COPIES)]
    remain = [copy for copy in copies if copy not in index]
    with capsys.disabled():
        print(f"\nleaks, {kind}: {COPIES} copies tried, {len(remain)} remain")
    assert not remain


def letter_runs(text, size, step):
    plain = "".join(filter(str.isalnum, text.casefold()))
    return {plain[i : i + size] for i in range(0, len(plain) - size + 1, step)}


def test_what_is_no_copy_is_kept(parted, capsys):
    training, held = parted
    shared = set().union(*(letter_runs(text, 40, 1) for text in held))
    clean = [text for text in training if shared.isdisjoint(letter_runs(text, 40, 20))] + texts(300, 200, seed=5)
    index = ValidationIndex(held)
    gone = sum(text in index for text in clean)
    with capsys.disabled():
        print(f"\nleaks, clean text: {len(clean)} documents tried, {gone} dropped")
    assert len(clean) > 500 and gone <= 0.01 * len(clean)
