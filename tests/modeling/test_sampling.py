"""Filters, draws and acceptance as pure functions."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cognica_poe.modeling.sampling_cognica_poe import (
    TokenChoice,
    accept_or_resample,
    count_leading,
    inverse_cdf,
    uniforms,
)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 5, 500])
@pytest.mark.parametrize("top_p", [None, 0.1, 0.8, 1.0])
def test_filters_equal_those_of_transformers(temperature, top_k, top_p):
    scores = torch.randn(6, 50, dtype=torch.float64) * 2
    if top_p is None:
        scores[0, 10:20] = scores[0, 10]  # ties at the edge of top-k; at that of top-p their order is arbitrary
    expected = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = TokenChoice(True, temperature, top_k, top_p).probabilities(scores)
    torch.testing.assert_close(found, expected.softmax(-1), rtol=0, atol=1e-12)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0]).expand(7, 6)
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.74, 0.75, 0.999, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(weights, uniform).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_a_draw_never_takes_an_impossible_token():
    weights = torch.rand(20_000, 40) * (torch.rand(20_000, 40) < 0.2)
    weights[:, 7] += 1e-6
    drawn = inverse_cdf(weights, torch.rand(20_000, dtype=torch.float64))
    assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_draws_follow_the_distribution():
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3])
    drawn = inverse_cdf(weights.expand(40_000, 4), uniforms(3, 40_000, 1)[:, 0, 0])
    counts = torch.bincount(drawn, minlength=4) / 40_000
    torch.testing.assert_close(counts, weights, rtol=0, atol=0.01)


def test_uniforms_of_a_row_do_not_depend_on_the_other_rows():
    assert torch.equal(uniforms(9, 5, 8)[:2], uniforms(9, 2, 8))
    assert not torch.equal(uniforms(9, 2, 8), uniforms(10, 2, 8))
    table = uniforms(1, 200, 50)
    correlation = torch.corrcoef(table.reshape(-1, 3).T)
    assert (correlation - torch.eye(3)).abs().max() < 0.05


def test_greedy_picks_the_lowest_of_equal_tokens():
    assert TokenChoice().pick(torch.tensor([[0.0, 3.0, 3.0, 1.0]]), None).tolist() == [1]


def test_greedy_acceptance():
    best = torch.tensor([[4, 5, 6, 7], [4, 9, 6, 7], [9, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, 7]])
    drafts = torch.tensor([[4, 5, 6]]).expand(5, 3)
    counts = torch.tensor([3, 3, 3, 2, 0])
    assert count_leading(best[:, :-1] == drafts, counts).tolist() == [3, 1, 0, 2, 0]


def test_acceptance_rule_on_chosen_numbers():
    target = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).double()[None]
    draft = torch.tensor([[0.25, 0.25, 0.5]]).double()[None]

    def run(drafted: int, accept: float, final: float, count: int = 1) -> tuple[int, int]:
        kept, token = accept_or_resample(
            target,
            draft,
            torch.tensor([[drafted]]),
            torch.tensor([count]),
            torch.tensor([[accept]]).double(),
            torch.tensor([[final, final]]).double(),
        )
        return kept.item(), token.item()

    assert run(0, 0.999, 0.1) == (1, 0)  # target above draft: always kept, then a draw from the next target
    assert run(1, 0.999, 0.6) == (1, 2)
    assert run(2, 0.0, 0.4) == (0, 0)  # impossible for the target: never kept, replaced from the residual
    assert run(2, 0.0, 0.6) == (0, 1)
    assert run(0, 0.0, 0.6, count=0) == (0, 1)  # nothing drafted: a draw from the target itself
