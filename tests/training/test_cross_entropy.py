"""The chunked soft-capped cross-entropy against the obvious version with full logits."""

import pytest
import torch

from cognica_poe.training import cross_entropy
from cognica_poe.training.cross_entropy import chunk_rows, softcap_cross_entropy
from tests.oracles.cross_entropy import reference_cross_entropy

CAP = 15.0


def inputs(rows=37, width=12, vocab=29, dtype=torch.float64, magnitude=1.0):
    generator = torch.Generator().manual_seed(3)
    n = magnitude * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return n.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def value_and_gradients(function, n, weight, targets, scale=0.7):
    loss = function(n, weight, targets, CAP)
    return loss, *torch.autograd.grad(loss * scale, (n, weight))


@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 5, 36, 37, 1000])
def test_boundaries_of_chunks_and_blocks_change_nothing(monkeypatch, rows_per_chunk, rows_per_block):
    n, weight, targets = inputs()
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", rows_per_block * weight.shape[0])
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows_per_chunk * weight.shape[0])
    assert chunk_rows(37, 29, n.device) == min(37, rows_per_chunk)
    ours = value_and_gradients(softcap_cross_entropy, n, weight, targets)
    expected = value_and_gradients(reference_cross_entropy, n, weight, targets)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_vocabulary_larger_than_a_chunk_goes_row_by_row(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 4)
    assert chunk_rows(37, 29, torch.device("cpu")) == 1


def test_gradients_match_finite_differences():
    n, weight, targets = inputs(rows=3, width=4, vocab=5)
    assert torch.autograd.gradcheck(lambda n, w: softcap_cross_entropy(n, w, targets, CAP), (n, weight))


def test_fp32_stays_within_rounding(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 29 * 8)
    ours = value_and_gradients(softcap_cross_entropy, *inputs(dtype=torch.float32))
    expected = value_and_gradients(reference_cross_entropy, *inputs())
    assert [t.dtype for t in ours] == [torch.float32] * 3
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-5)


def test_bf16_states_with_fp32_weights():
    n, weight, targets = inputs()
    low = n.detach().bfloat16().requires_grad_()
    master = weight.detach().float().requires_grad_()
    loss, grad_n, grad_w = value_and_gradients(softcap_cross_entropy, low, master, targets)
    assert (loss.dtype, grad_n.dtype, grad_w.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    expected = value_and_gradients(reference_cross_entropy, low.detach().double().requires_grad_(), weight, targets)
    torch.testing.assert_close(loss.double(), expected[0], atol=0.02, rtol=0.02)
    for ours, exact in zip((grad_n, grad_w), expected[1:], strict=True):
        assert torch.cosine_similarity(ours.double().flatten(), exact.flatten(), dim=0) > 0.999


def test_without_gradients_only_the_value_is_made():
    n, weight, targets = inputs()
    with torch.no_grad():
        loss = softcap_cross_entropy(n.detach(), weight.detach(), targets, CAP)
        under_no_grad = softcap_cross_entropy(n, weight, targets, CAP)
    assert not loss.requires_grad and not under_no_grad.requires_grad
    expected = reference_cross_entropy(n, weight, targets, CAP).detach()
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(under_no_grad, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("trainable", ["n", "weight"])
def test_one_trainable_side(trainable):
    n, weight, targets = inputs()
    (weight if trainable == "n" else n).requires_grad_(False)
    side = n if trainable == "n" else weight
    ours, expected = (
        torch.autograd.grad(function(n, weight, targets, CAP), side)[0]
        for function in (softcap_cross_entropy, reference_cross_entropy)
    )
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_logits_saturate_at_the_cap(dtype):
    """Logits of +-1e5 sit at the cap: the loss stays finite, at most 2 cap + log V, and the gradient vanishes."""
    n, weight, targets = inputs(dtype=dtype, magnitude=1e5)
    ours = value_and_gradients(softcap_cross_entropy, n, weight, targets)
    expected = value_and_gradients(reference_cross_entropy, n, weight, targets)
    for a, b in zip(ours, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=1e-10 if dtype == torch.float64 else 1e-5, rtol=1e-5)
    assert ours[0] < 2 * CAP + 3.4


def test_chunks_bound_the_logits_held():
    """Never all tokens of a large batch, and never so few that the product waits for the head to be read."""
    processor = torch.device("cpu")
    assert chunk_rows(1 << 20, 32768, processor) == 1024
    assert chunk_rows(100, 32768, processor) == 100
    assert chunk_rows(1 << 20, 512, processor) == cross_entropy.CHUNK_ELEMENTS // 512
    assert chunk_rows(1 << 20, 32768, torch.device("cuda")) == 4096
