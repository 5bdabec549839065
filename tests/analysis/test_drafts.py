import numpy as np
import pytest
import torch

from cognica_poe.analysis.drafts import LENGTHS, choose_places, count_rounds, drafts_behind, measure_drafts
from tests.analysis.helpers import BOS, ByteTokenizer, make_texts
from tests.conftest import make_model

TOKENIZER = ByteTokenizer()


def test_counts_of_every_length_are_those_of_speculative_decoding():
    model, texts = make_model(max_position_embeddings=64), make_texts(12, longest=200)
    result = measure_drafts(model, TOKENIZER, texts, np.arange(12), drafts=150, batch_rows=5)
    owner, prompts = choose_places([np.array(TOKENIZER.encode(text)) for text in texts], BOS, result.prompts, 32)
    assert (result.context, result.new_tokens, result.prompts) == (32, 32, -(-150 // 15)) and len(set(owner)) > 3
    for length in (result.lengths[place] for place in (0, 2, 7)):
        totals = np.zeros(3, dtype=int)
        for prompt in prompts:
            _, counts = model.generate_speculative(
                torch.tensor(prompt[None]), max_new_tokens=32, k_draft=length.k_draft, return_acceptance=True,
                eos_token_id=[],
            )  # fmt: skip
            totals += [counts["proposed"], counts["accepted"], counts["rounds"]]
        assert (length.proposed, length.accepted, length.rounds) == tuple(totals)
        assert length.acceptance == totals[1] / totals[0] and length.low <= length.acceptance <= length.high
        assert length.tokens_per_round == pytest.approx(31 * result.prompts / length.rounds)
    assert tuple(length.k_draft for length in result.lengths) == LENGTHS
    assert result.lengths[0].proposed >= 150 and 0 < result.lengths[0].accepted < result.lengths[0].proposed


def test_prompts_of_unequal_length_count_like_one_at_a_time():
    model = make_model(max_position_embeddings=64)
    prompts = [
        [BOS, *TOKENIZER.encode(text[:length])]
        for text, length in zip(make_texts(5, longest=200), (3, 9, 20, 1, 30), strict=True)
    ]
    found = drafts_behind(model, prompts, k_draft=3, new_tokens=20)
    for prompt, (proposed, accepted) in zip(prompts, found.by_prompt, strict=True):
        _, counts = model.generate_speculative(
            torch.tensor([prompt]), max_new_tokens=20, k_draft=3, return_acceptance=True, eos_token_id=[]
        )
        assert (counts["proposed"], counts["accepted"]) == (proposed, accepted)
    assert found.new_tokens == 20 and found.low <= found.acceptance <= found.high
    assert drafts_behind(model, [[BOS] * 10, [BOS] * 62], k_draft=3) is None


def test_rounds_follow_the_text():
    every = [True] * 9
    assert count_rounds(every, 4) == (6, 6, 2) and count_rounds(every, 1) == (4, 4, 4)
    assert count_rounds([True, False, True, True, False], 2) == (
        4,
        2,
        2,
    )  # both wrong, both right and a token of the pool
    assert count_rounds([True], 4) == (0, 0, 0)


def test_places_are_spread_over_whole_documents():
    encoded = [np.arange(100), np.arange(3), np.arange(300) + 1000]
    owner, prompts = choose_places(encoded, BOS, 40, 8)
    assert prompts.shape == (40, 8) and (prompts[:, 0] == BOS).all() and set(owner) == {0, 2}
    assert (owner == 2).sum() == pytest.approx(40 * 295 / 390, abs=1)
    assert (np.diff(prompts[:, 1:], axis=1) == 1).all()  # consecutive tokens of one document
    assert prompts[owner == 2, 1].max() > 1250  # far behind the opening
    everything = choose_places(encoded, BOS, 10_000, 8)[1]
    assert len(everything) == len(np.unique(everything, axis=0)) == -(-(94 + 294) // 8)  # hardly overlapping
    assert len(choose_places([np.arange(2)], BOS, 5, 8)[0]) == 0


def test_documents_of_one_file_belong_together():
    model, texts = make_model(max_position_embeddings=64), make_texts(6, longest=200)
    alone = measure_drafts(model, TOKENIZER, texts, np.arange(6), drafts=100)
    together = measure_drafts(model, TOKENIZER, texts, np.zeros(6, dtype=int), drafts=100)
    assert together.documents == 1 < alone.documents and together.lengths[0].low is None
    assert together.lengths[0].acceptance == alone.lengths[0].acceptance


@pytest.mark.parametrize("changes", [{"poe_mode": "none"}, {"poe_stage_layers": [5]}])
def test_nothing_drafts(changes):
    assert measure_drafts(make_model(**changes), TOKENIZER, make_texts(3), np.arange(3)) is None
