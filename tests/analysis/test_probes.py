import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cognica_poe.analysis.grading import first_named
from cognica_poe.analysis.probes import PROBES, Probe, run_probes
from tests.analysis.helpers import BOS, ByteTokenizer
from tests.conftest import make_model

FRANCE, GOLD, FRIDAY, HOT, PLANETS, COLOR, ALGEBRA = PROBES


@pytest.mark.parametrize(
    ("probe", "continuation", "correct"),
    [
        (FRANCE, " Paris, the largest city in France.", True),
        (FRANCE, " the city of Paris", True),
        (FRANCE, " Lyon, not Paris", False),
        (FRANCE, " paris", False),
        (FRANCE, ": The capital of France is Paris", True),
        (FRANCE, " Parisian", False),
        (GOLD, " Au. The symbol", True),
        (GOLD, ' "Au" and it is', True),
        (GOLD, " Ag, not Au", False),
        (GOLD, " A", False),
        (GOLD, " AU", False),
        (FRIDAY, " Sunday, and the day after", True),
        (FRIDAY, " Saturday. Then comes Sunday", False),
        (FRIDAY, " the same", False),
        (HOT, " cold.", True),
        (HOT, " warm and cold", False),
        (HOT, " not cold", False),
        (PLANETS, " Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, and Neptune. Pluto", True),
        (PLANETS, "\n1. Mercury\n2. Venus\n3. Earth\n4. Mars\n5. Jupiter\n6. Saturn\n7. Uranus\n8. Neptune", True),
        (PLANETS, " Mercury, Venus, Earth, the Moon, Mars, Jupiter, Saturn, Uranus, Neptune", False),
        (PLANETS, " Mercury, Venus, Earth, Mars", False),
        (COLOR, " Blue, like the sky", True),
        (COLOR, " reddish", False),
        (COLOR, " my name", False),
        (ALGEBRA, " equal to 2.", True),
        (ALGEBRA, " two", True),
        (ALGEBRA, " 2.5", False),
        (ALGEBRA, " 13/5 or 2", False),
        (ALGEBRA, " 20", False),
        (ALGEBRA, " -2", False),
        (ALGEBRA, "", False),
        (ALGEBRA, " 10/5 = 2", True),
        (ALGEBRA, " found by 5*x = 10, so x = 2.", True),
        (ALGEBRA, ". If 5*x + 3 = 13, then x is 2.", True),
        (ALGEBRA, "\nA. 3\nB. 2\nC. 4\nThe answer is B.", True),
        (ALGEBRA, "\nA. 2\nB. 3\nThe answer is (B)", False),
        (ALGEBRA, " 2 times 5", False),
        (ALGEBRA, " 2*x", False),
        (GOLD, ". It is Au.", True),
        (GOLD, " written as Au", True),
        (GOLD, " 79, and it is Au", False),
        (GOLD, " not Ag but Au", True),
        (HOT, " not hot but cold", True),
        (
            PLANETS,
            "\n1. Mercury - the first\n2. Venus - hot\n3. Earth\n4. Mars\n5. Jupiter\n6. Saturn\n7. Uranus\n"
            "8. Neptune - the last",
            True,
        ),
        (PLANETS, " the bodies that orbit the Sun, such as Venus, Earth and Mars", False),
    ],
)
def test_grades(probe, continuation, correct):
    assert probe.grade(continuation).correct is correct


@pytest.mark.parametrize(
    ("probe", "continuation", "reason"),
    [
        (ALGEBRA, "\n 2\n 2\n 2\n 2", "loop"),
        (ALGEBRA, " 2 2 2 2 2", "loop"),
        (GOLD, " Au Au Au Au", "loop"),
        (COLOR, " blue, blue, blue", "loop"),
        (ALGEBRA, "\nA. 2\nB. 3\nC. 4", "choices"),
        (ALGEBRA, " (A) 2 (B) 3", "choices"),
        (ALGEBRA, " 5x + 3 = 13", "echo"),
        (FRANCE, " the capital of France is the capital of France", "echo"),
        (FRIDAY, " the same", "no answer"),
        (PLANETS, " Mercury and Venus", "no answer"),
        (HOT, "", "no answer"),
    ],
)
def test_what_asserts_nothing_is_no_answer_and_says_why(probe, continuation, reason):
    found = probe.grade(continuation)
    assert (found.correct, found.answer, found.reason) == (False, None, reason)


def test_the_expected_answer_is_graded_correct():
    for probe in PROBES:
        found = probe.grade(" blue" if probe is COLOR else f" {probe.expected}.")
        assert found.correct and found.answer and found.reason is None
        assert not probe.grade("").correct


DIFFERS = {  # where these rules and the model card's author differ, and why
    (GOLD.prompt, 38_000): "a bare loop of the answer is no answer",
    (FRANCE.prompt, 46_000): "a bare loop of the answer is no answer",
    (PLANETS.prompt, 34_000): "the eight planets come first; Pluto behind them is let pass, as the card does at 28,000",
}


def test_grades_agree_with_the_model_card():
    rows = json.loads((Path(__file__).parent / "card_continuations.json").read_text())["rows"]
    probes, differing, facts = {probe.prompt: probe for probe in PROBES}, set(), 0
    for row in rows:
        probe = probes[row["probe"]]
        if probe.grade(" " + row["text"]).correct != row["right"]:
            differing.add((row["probe"], row["step"]))
        for name, fact in probe.facts.items():
            if "fact" in row:
                assert fact(row["text"]) is row["fact"], (name, row)
                facts += 1
    assert len(rows) == 126 and sum(row["right"] for row in rows) == 45 and facts == 27
    assert differing == set(DIFFERS), "listed with reasons, and no other"
    assert 1 - len(differing) / len(rows) >= 0.95


class Script(torch.nn.Module):
    """Continues every prompt with the same ids."""

    def __init__(self, ids):
        super().__init__()
        self.weight, self.ids = torch.nn.Parameter(torch.zeros(1)), ids
        self.config = SimpleNamespace(max_position_embeddings=128)

    def generate(self, ids, *, attention_mask, max_new_tokens, do_sample, num_beams):
        assert not do_sample and ids[0, 0] == BOS and bool(attention_mask.all()) and not self.training
        return torch.cat([ids, torch.tensor([self.ids[:max_new_tokens]])], 1)


def test_continuations_are_decoded_up_to_the_first_special_token():
    tokenizer = ByteTokenizer()
    model = Script([*tokenizer.encode(" cold it is"), BOS, *tokenizer.encode("hot")]).train()
    results = run_probes(model, tokenizer)
    assert [result.prompt for result in results] == [probe.prompt for probe in PROBES]
    assert {result.continuation for result in results} == {" cold it is"}
    assert [result.correct for result in results] == [probe is HOT for probe in PROBES]
    assert model.training
    assert {result.answer for result in results} == {"cold", None}
    assert results[1].facts == {"atomic number 79": None}
    assert run_probes(model, tokenizer, new_tokens=3)[0].continuation == " co"


def test_real_model_continues_greedily():
    model, tokenizer = make_model(max_position_embeddings=128), ByteTokenizer()
    probe = Probe("ab", "x", first_named("x", "x"))
    (result,) = run_probes(model, tokenizer, new_tokens=6, probes=[probe])
    ids = [BOS, *tokenizer.encode("ab")]
    for _ in range(6):
        ids.append(int(model.forward_aggregated(torch.tensor([ids]))[0, -1].argmax()))
    new = ids[3:]
    new = new[: new.index(BOS)] if BOS in new else new
    assert result.continuation == tokenizer.decode(new)
    assert run_probes(model, tokenizer, new_tokens=6, probes=[probe]) == [result]
