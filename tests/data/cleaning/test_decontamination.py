import random

import pytest

from cognica_poe.data.cleaning.decontamination import EvaluationIndex
from tests.data.corpora import made_up_text

QUESTION = "A train leaves the station at nine with forty people and stops at three towns on its way"


def around(text, seed=0):
    rng = random.Random(seed)
    return f"{made_up_text(rng, 200)} {text} {made_up_text(rng, 200)}"


def test_a_run_of_words_is_found_wherever_it_stands():
    index = EvaluationIndex([QUESTION, "the second text of eight words is here"])
    words = QUESTION.split()
    assert around(QUESTION) in index and around(QUESTION.upper().replace(" ", ",\n")) in index
    assert around(" ".join(words[3:16])) in index
    assert around(" ".join(words[:12])) not in index
    assert around(" ".join([*words[:9], "changed", *words[9:]])) not in index
    assert around("The second text of eight words is here!") in index
    assert around("the second text of eight words was here") not in index


@pytest.mark.parametrize("words", [8, 13, 5])
def test_the_length_of_a_run_is_a_setting(words):
    index = EvaluationIndex([QUESTION], words)
    assert around(" ".join(QUESTION.split()[2 : 2 + words])) in index
    assert around(" ".join(QUESTION.split()[2 : 1 + words])) not in index


def test_texts_of_few_words_are_not_searched_for():
    assert around("Yes it is") not in EvaluationIndex(["Yes it is", "", "?"])
