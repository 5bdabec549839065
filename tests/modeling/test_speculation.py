"""Speculation is exact: greedy output equals generate(), sampled output follows the enumerated distribution."""

import pytest
import torch

from cognica_poe.modeling import loops_cognica_poe as loops
from cognica_poe.modeling.sampling_cognica_poe import TokenChoice, accept_or_resample, combine, inverse_cdf
from tests.conftest import make_model


def agreeing_model(seed: int, softness: float = 0.3, **changes):
    """Deep layers and stage heads scaled down, so that drafts are accepted often, but not always."""
    model = make_model(seed=seed, **changes)
    with torch.no_grad():
        for block in model.transformer.h[2:]:
            block.attn.c_proj.weight.mul_(softness)
            block.mlp.c_proj.weight.mul_(softness)
        for head in model.lm_head_stages:
            head.weight.mul_(softness)
    return model


def fifty_prompts(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fifty texts of 100 tokens; every third one is cut at the left."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(0, 97, (50, 100), generator=generator), torch.ones(50, 100, dtype=torch.int64)
    for row in range(0, 50, 3):
        mask[row, : 2 * row] = 0
    return ids, mask


def assert_greedy_equality(model, ids, mask, draft_stages, lengths, tokens: int) -> float:
    options = {"attention_mask": mask, "max_new_tokens": tokens, "pad_token_id": 0}
    expected = model.generate(ids, do_sample=False, **options)
    rates = []
    for draft_stage in draft_stages:
        for k_draft in lengths:
            output, drafts = model.generate_speculative(ids, draft_stage, k_draft, return_acceptance=True, **options)
            assert torch.equal(output, expected), (draft_stage, k_draft)
            assert drafts["acceptance"] == drafts["accepted"] / drafts["proposed"]
            rates.append(drafts["acceptance"])
    return min(rates)


def test_greedy_output_is_that_of_generate():
    ids, mask = fifty_prompts(0)
    lowest = assert_greedy_equality(agreeing_model(0), ids, mask, (0, 1, 2), (1, 4), 24)
    assert 0.3 < lowest < 0.95


@pytest.mark.slow
@pytest.mark.parametrize("k_draft", range(1, 9))
def test_greedy_output_is_that_of_generate_in_full(k_draft):
    for seed, softness in ((0, 0.3), (1, 1.0)):
        ids, mask = fifty_prompts(seed)
        model = agreeing_model(seed, softness)
        assert_greedy_equality(model, ids, mask, (0, 1, 2), (k_draft,), 100)
        for row in (0, 1, 3):
            assert_greedy_equality(model, ids[row : row + 1], mask[row : row + 1], (0, 1, 2), (k_draft,), 100)


@pytest.mark.parametrize("layers", [[5], [1, 4], [1, 1, 1, 2]])
@pytest.mark.parametrize("per_stage_head", [True, False])
def test_every_stage_layout(layers, per_stage_head):
    model = agreeing_model(2, poe_stage_layers=layers, per_stage_head=per_stage_head, poe_alpha=0.5)
    ids, mask = fifty_prompts(1)
    assert_greedy_equality(model, ids[:4], mask[:4], range(len(layers)), (3,), 12)


def test_drafts_that_always_agree():
    model = agreeing_model(0, poe_stage_layers=[5])
    ids, mask = fifty_prompts(0)
    options = {"attention_mask": mask[:2], "max_new_tokens": 21, "return_acceptance": True}
    _, drafts = model.generate_speculative(ids[:2], k_draft=4, **options)
    # Rounds give 5 tokens each; the last of 21 needs one more round without a draft.
    assert drafts == {"acceptance": 1.0, "proposed": 2 * 16, "accepted": 2 * 16, "rounds": 2 * 5}
    _, drafts = model.generate_speculative(ids[:2], k_draft=4, **{**options, "max_new_tokens": 1})
    assert drafts == {"acceptance": 0.0, "proposed": 0, "accepted": 0, "rounds": 2}


# ---- the sampled distribution -------------------------------------------------------------------------------------

VOCAB, ROWS = 6, 6000
CHOICES = {
    "plain": {},
    "hot": {"temperature": 1.8},
    "cold_top_k": {"temperature": 0.6, "top_k": 4},
    "top_p": {"top_p": 0.8},
}


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """p-value of the observed counts; cells expected below 5 are pooled. An impossible outcome gives 0."""
    if observed[expected == 0].any():
        return 0.0
    small = expected < 5
    observed = torch.cat((observed[~small], observed[small].sum()[None])).double()
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0).double(), statistic / 2).item()


@torch.no_grad()
def exact_joint(model, prompt: torch.Tensor, choice: TokenChoice) -> torch.Tensor:
    """Probability ``[V * V]`` of the next two tokens under the full pool, enumerated."""
    texts = torch.cat((prompt.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]), dim=1)
    pool = combine(model.all_logits(texts)[0], model.config.poe_alpha)
    first, second = choice.probabilities(pool[0, -2]), choice.probabilities(pool[:, -1])
    return (first[:, None] * second).flatten()


def tiny_vocabulary_model():
    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = agreeing_model(4, 0.8, vocab_size=VOCAB, num_key_value_heads=1, poe_stage_layers=[1, 1, 1], **small)
    with torch.no_grad():  # stages that clearly disagree, far from uniform
        for head in model.lm_head_stages:
            head.weight.add_(0.25 * torch.randn_like(head.weight))
    return model


def sample_p(model, choice: dict, **options) -> tuple[float, dict]:
    prompt = torch.tensor([[1, 4, 2, 0, 3]])
    ids, drafts = model.generate_speculative(
        prompt.expand(ROWS, -1), do_sample=True, seed=17, return_acceptance=True, **choice, **options
    )
    cells = ids[:, 5] * VOCAB + ids[:, 6]
    expected = ROWS * exact_joint(model, prompt, TokenChoice(True, **choice))
    return chi_square_p(torch.bincount(cells, minlength=VOCAB**2), expected), drafts


@pytest.mark.parametrize("k_draft", [1, 3])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_sampled_output_follows_the_pool(choice, k_draft):
    p, drafts = sample_p(tiny_vocabulary_model(), choice, k_draft=k_draft, max_new_tokens=4)
    assert 0.2 < drafts["acceptance"] < 0.97
    assert p > 1e-3


@pytest.mark.parametrize("draft_stage", [1, 2])
def test_sampled_output_follows_the_pool_for_deeper_drafts(draft_stage):
    p, _ = sample_p(tiny_vocabulary_model(), {}, draft_stage=draft_stage, k_draft=3, max_new_tokens=4)
    assert p > 1e-3


def test_plain_sampling_follows_the_pool():
    model, prompt = tiny_vocabulary_model(), torch.tensor([[1, 4, 2, 0, 3]])
    ids = model.generate_prefix(prompt.expand(ROWS, -1), do_sample=True, seed=3, max_new_tokens=2, top_k=5)
    expected = ROWS * exact_joint(model, prompt, TokenChoice(True, top_k=5))
    assert chi_square_p(torch.bincount(ids[:, 5] * VOCAB + ids[:, 6], minlength=VOCAB**2), expected) > 1e-3


def always_keep(target, draft, drafts, counts, accept, final):
    return accept_or_resample(draft[:, :1].expand_as(target), draft, drafts, counts, accept * 0, final)


def resample_from_the_target(target, draft, drafts, counts, accept, final):
    kept, _ = accept_or_resample(target, draft, drafts, counts, accept, final)
    rows = torch.arange(len(kept))
    return kept, inverse_cdf(target[rows, kept], final[rows, kept])


def one_stream_for_both(target, draft, drafts, counts, accept, final):
    return accept_or_resample(target, draft, drafts, counts, final[:, :-1], final)


def forget_the_proposal(target, draft, drafts, counts, accept, final):
    return accept_or_resample(target, draft.softmax(-1), drafts, counts, accept, final)


@pytest.mark.parametrize("wrong", [always_keep, resample_from_the_target, one_stream_for_both, forget_the_proposal])
def test_the_same_test_rejects_wrong_samplers(monkeypatch, wrong):
    monkeypatch.setattr(loops, "accept_or_resample", wrong)
    p, _ = sample_p(tiny_vocabulary_model(), {}, k_draft=2, max_new_tokens=4)
    assert p < 1e-9
