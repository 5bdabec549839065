import numpy as np
import pytest
import torch

from cognica_poe.analysis.speculative import choose_prompts, measure_acceptance
from tests.analysis.helpers import BOS, ByteTokenizer, make_texts


class FakeModel(torch.nn.Module):
    """Counts as a speculative decoder would: the first prompt token decides how many of each 4 drafts are accepted."""

    def __init__(self, stages=3, poe_mode="flat"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"num_stages": stages, "poe_mode": poe_mode})()
        self.calls = []

    def generate_speculative(self, ids, *, max_new_tokens, draft_stage, k_draft, return_acceptance):
        assert return_acceptance and not self.training and ids.shape[0] == 1 and ids[0, 0] == BOS
        self.calls.append((max_new_tokens, draft_stage, k_draft))
        accepted = int(ids[0, 1]) % (k_draft + 1)
        rounds = max_new_tokens // (accepted + 1)
        new = torch.zeros((1, max_new_tokens), dtype=ids.dtype)
        counts = {"proposed": rounds * k_draft, "accepted": rounds * accepted, "rounds": rounds}
        return torch.cat([ids, new], 1), {**counts, "acceptance": accepted / k_draft}


def test_counts_are_pooled_over_prompts():
    model, prompts = FakeModel().train(), [[BOS, 0, 7], [BOS, 3, 7], [BOS, 4, 7]]
    result = measure_acceptance(model, prompts, new_tokens=20)
    # rounds 20, 5, 4; accepted per round 0, 3, 4
    assert (result.rounds, result.proposed, result.accepted) == (29, 116, 31)
    assert result.acceptance == pytest.approx(31 / 116)
    assert result.low <= result.acceptance <= result.high and 0 <= result.low < result.high <= 1
    assert (result.prompts, result.k_draft, result.draft_stage, result.new_tokens) == (3, 4, 0, 20)
    assert model.calls == [(20, 0, 4)] * 3 and model.training


def test_interval_narrows_with_more_prompts_and_is_repeatable():
    generator = np.random.default_rng(0)
    prompts = [[BOS, int(first)] for first in generator.integers(0, 5, size=64)]
    few, many = (measure_acceptance(FakeModel(), prompts[:n], new_tokens=20) for n in (8, 64))
    assert many.high - many.low < few.high - few.low
    assert measure_acceptance(FakeModel(), prompts, new_tokens=20) == many


def test_k_draft_is_what_the_model_drafts():
    results = [measure_acceptance(FakeModel(), [[BOS, 1], [BOS, 2]], k_draft=n, new_tokens=12) for n in (2, 8)]
    assert [result.k_draft for result in results] == [2, 8]
    assert [result.acceptance for result in results] == pytest.approx([(6 + 8) / 20, (6 + 8) / 80])


@pytest.mark.parametrize("model", [FakeModel(stages=1), FakeModel(poe_mode="none")])
def test_without_a_draft_stage_nothing_is_proposed(model):
    result = measure_acceptance(model, [[BOS, 1]])
    assert result.acceptance is None and result.low is None and result.proposed == 0 and not model.calls


def test_one_prompt_has_no_interval():
    result = measure_acceptance(FakeModel(), [[BOS, 2]])
    assert result.acceptance == 0.5 and result.low is None and result.high is None
    assert measure_acceptance(FakeModel(), []).acceptance is None


def test_prompts_are_openings_of_long_documents():
    tokenizer, texts = ByteTokenizer(), make_texts(30)
    prompts = choose_prompts(tokenizer, texts, count=5, tokens=20)
    openings = [[BOS, *tokenizer.encode(text)[:19]] for text in texts if len(text) >= 19]
    assert len(prompts) == 5 and len({tuple(prompt) for prompt in prompts}) == 5
    assert prompts[0] == openings[0] and prompts[-1] == openings[-1]
    assert all(prompt in openings for prompt in prompts)
    assert choose_prompts(tokenizer, texts, count=5, tokens=20) == prompts


def test_short_documents_serve_whole():
    tokenizer = ByteTokenizer()
    assert choose_prompts(tokenizer, ["ab", "", "c"], count=9, tokens=20) == [
        [BOS, *tokenizer.encode("ab")],
        [BOS, *tokenizer.encode("c")],
    ]
    assert choose_prompts(tokenizer, [], count=9, tokens=20) == []
