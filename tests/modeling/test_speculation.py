"""Speculation is exact: greedy output equals generate(), sampled output follows the enumerated distribution."""

import pytest
import torch

from cognica_poe.modeling import speculation_cognica_poe as speculation
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
    # The prompt's own pass gives the first token, every round 5 more.
    assert drafts == {"acceptance": 1.0, "proposed": 2 * 16, "accepted": 2 * 16, "rounds": 2 * 4}
    _, drafts = model.generate_speculative(ids[:2], k_draft=4, **{**options, "max_new_tokens": 1})
    assert drafts == {"acceptance": 0.0, "proposed": 0, "accepted": 0, "rounds": 0}


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
def exact_joint(model, prompt: torch.Tensor, choice: TokenChoice, tokens: int = 2, eos: int | None = None):
    """Probability ``[V ** tokens]`` of the next tokens under the full pool, enumerated; 0 follows an end token."""
    texts, joint = prompt, torch.ones(1, dtype=torch.float64)
    for _ in range(tokens):
        pool = combine([logits[:, -1] for logits in model.all_logits(texts)[0]], model.config.poe_alpha)
        following = choice.probabilities(pool)
        if eos is not None:
            ended = (texts[:, prompt.shape[1] :] == eos).any(dim=1)
            following[ended] = torch.nn.functional.one_hot(torch.tensor(0), VOCAB).double()
        joint = (joint[:, None] * following).flatten()
        new = torch.arange(VOCAB).repeat(len(texts))[:, None]
        texts = torch.cat((texts.repeat_interleave(VOCAB, dim=0), new), dim=1)
    return joint


def tiny_vocabulary_model():
    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = agreeing_model(4, 0.8, vocab_size=VOCAB, num_key_value_heads=1, poe_stage_layers=[1, 1, 1], **small)
    with torch.no_grad():  # stages that clearly disagree, far from uniform
        for head in model.lm_head_stages:
            head.weight.add_(0.25 * torch.randn_like(head.weight))
    return model


def sample_p(model, choice, tokens=2, rows=ROWS, eos: int | None = None, skip: int = 0, seed: int = 17, **options):
    """p-value of ``tokens`` sampled tokens behind the first ``skip``, and what the drafts were worth."""
    prompt = torch.tensor([[1, 4, 2, 0, 3]])
    end = {} if eos is None else {"eos_token_id": eos, "pad_token_id": 0}
    ids, drafts = model.generate_speculative(
        prompt.expand(rows, -1), do_sample=True, seed=seed, return_acceptance=True, **choice, **end, **options
    )
    cells = sum(ids[:, 5 + skip + i] * VOCAB ** (tokens - 1 - i) for i in range(tokens))
    joint = exact_joint(model, prompt, TokenChoice(True, **choice), skip + tokens, eos)
    expected = rows * joint.view(VOCAB**skip, -1).sum(dim=0)
    return chi_square_p(torch.bincount(cells, minlength=VOCAB**tokens), expected), drafts


@pytest.mark.parametrize("k_draft", [1, 3])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_sampled_output_follows_the_pool(choice, k_draft):
    p, drafts = sample_p(tiny_vocabulary_model(), choice, k_draft=k_draft, max_new_tokens=5)
    assert 0.2 < drafts["acceptance"] < 0.97
    assert p > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("eos", [None, 3])
@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_sampled_output_follows_the_pool_in_full(choice, tokens, eos):
    model, found = tiny_vocabulary_model(), {}
    cases = [(drafter, k, 0.0) for drafter in ("stage", "lookup") for k in range(1, 9)]
    cases += [("stage", 6, 0.2), ("lookup", 6, 0.5)]
    for seed, (drafter, k_draft, confidence) in enumerate(cases):
        # Behind the first two tokens a row stands anywhere in its round. Every case draws numbers of its own: with the
        # same ones, draft lengths would repeat each other's sample.
        how = {"k_draft": k_draft, "drafter": drafter, "draft_confidence": confidence, "max_new_tokens": tokens + 5}
        found[drafter, k_draft, confidence], _ = sample_p(model, choice, tokens, 4000, eos, 2, seed, **how)
    print(f"p-values, {tokens} tokens, end {eos}, {choice}:", {key: f"{p:.3f}" for key, p in found.items()})
    assert min(found.values()) > 1e-3


def test_rows_of_unequal_prompts_follow_their_own_pools():
    model = tiny_vocabulary_model()
    short, rows = torch.tensor([[4, 2, 0]]), 3000
    ids = torch.cat(
        (torch.tensor([[1, 4, 2, 0, 3]]).expand(rows, -1), torch.tensor([[0, 0, 4, 2, 0]]).expand(rows, -1))
    )
    mask = torch.ones_like(ids)
    mask[rows:, :2] = 0
    out = model.generate_speculative(ids, do_sample=True, seed=5, k_draft=3, attention_mask=mask, max_new_tokens=5)
    for part, prompt in ((out[:rows], ids[:1]), (out[rows:], short)):
        expected = rows * exact_joint(model, prompt, TokenChoice(True))
        assert chi_square_p(torch.bincount(part[:, 5] * VOCAB + part[:, 6], minlength=VOCAB**2), expected) > 1e-3


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
    monkeypatch.setattr(speculation, "accept_or_resample", wrong)
    p, _ = sample_p(tiny_vocabulary_model(), {}, k_draft=2, max_new_tokens=4)
    assert p < 1e-9
