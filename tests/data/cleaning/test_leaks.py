import random

import pytest

from cognica_poe.data.cleaning.leaks import ValidationIndex
from tests.data.corpora import made_up_text, texts

SENTENCE = "A quick movement of the enemy will jeopardize six gunboats near the old harbour wall"


@pytest.mark.parametrize("held", ["!?!", "Yes.", SENTENCE, SENTENCE + "\n\n" + "More of it stands here. " * 30])
def test_texts_of_any_length_are_found(held):
    index = ValidationIndex([*texts(20), held])
    assert held in index and held.upper() in index and f"\n {held}  " in index
    assert "No." not in index and "???" not in index and SENTENCE[:15] not in index


def test_a_sentence_in_a_long_text_is_a_quotation():
    index = ValidationIndex([f"{SENTENCE}\n\n" + "\n".join(texts(3))])
    assert f"{made_up_text(random.Random(7), 400)} {SENTENCE}." not in index
    assert f"Title\n{SENTENCE}" in index  # half of the text, where it is short


def test_lines_cut_to_one_width_are_one_paragraph():
    line = "These are words of a hard wrapped paragraph, number {}"
    held = "\n".join(line.format(["one", "two", "three", "four"][i]) for i in range(4))
    index = ValidationIndex([f"{held}\n\n" + made_up_text(random.Random(1), 500)])
    around = made_up_text(random.Random(2), 900)
    assert f"{around}\n{' '.join(held.split())}\n{around}" in index


def test_what_a_program_repeats_is_no_copy():
    held = "self.assertRaises(TypeError, value.method_number_{})"
    index = ValidationIndex(["\n".join(held.format(i) + f"\n{made_up_text(random.Random(i), 30)}" for i in range(9))])
    other = "\n".join(f"self.assertRaises(TypeError, value.method_{word})" for word in "abcdefghijklmnopqrst")
    assert other + made_up_text(random.Random(99), 300) not in index


def test_an_index_of_nothing():
    assert "anything" not in ValidationIndex([]) and "" not in ValidationIndex([])


def test_lines_of_one_form_are_no_copies():
    def lines(seed, count):
        numbers = random.Random(seed).sample(range(10**12), count)
        return "\n".join(f"the reading number {n:012d} was taken at the station" for n in numbers)

    index = ValidationIndex([lines(1, 40)])
    assert lines(2, 60) not in index and lines(1, 20) in index
