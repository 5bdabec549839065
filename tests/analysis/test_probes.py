from types import SimpleNamespace

import pytest
import torch

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
    ],
)
def test_grades(probe, continuation, correct):
    assert probe.correct(continuation) is correct


def test_the_expected_answer_is_graded_correct():
    for probe in PROBES:
        assert probe.correct(" blue" if probe is COLOR else f" {probe.expected}.")
        assert not probe.correct("")


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
    assert run_probes(model, tokenizer, new_tokens=3)[0].continuation == " co"


def test_real_model_continues_greedily():
    model, tokenizer = make_model(max_position_embeddings=128), ByteTokenizer()
    probe = Probe("ab", "x", "x", "x")
    (result,) = run_probes(model, tokenizer, new_tokens=6, probes=[probe])
    ids = [BOS, *tokenizer.encode("ab")]
    for _ in range(6):
        ids.append(int(model.forward_aggregated(torch.tensor([ids]))[0, -1].argmax()))
    new = ids[3:]
    new = new[: new.index(BOS)] if BOS in new else new
    assert result.continuation == tokenizer.decode(new)
    assert run_probes(model, tokenizer, new_tokens=6, probes=[probe]) == [result]
