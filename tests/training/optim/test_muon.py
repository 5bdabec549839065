"""Muon's pieces against exact or obvious versions: polar factor by SVD, per-matrix loops."""

import pytest
import torch

from cognica_poe.training.optim.muon import (
    ITERATIONS,
    muon_update,
    normalize_variance,
    orthogonalize,
    second_moment_shape,
)
from tests.oracles.muon import reference_orthogonalize

SHAPES = [(48, 12), (12, 48), (32, 32), (4, 12)]


def stack(rows, cols, count=3, seed=0):
    return torch.randn(count, rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_normalize(update, moment, beta2):
    """One matrix: every line is divided by its running RMS, then the matrix gets its old Frobenius norm back."""
    rows, cols = update.shape
    lines = [update[i] for i in range(rows)] if rows >= cols else [update[:, j] for j in range(cols)]
    moments = [beta2 * old + (1 - beta2) * line.square().mean() for old, line in zip(moment, lines, strict=True)]
    scaled = [line / m.clamp_min(1e-10).sqrt() for line, m in zip(lines, moments, strict=True)]
    out = torch.stack(scaled, dim=0 if rows >= cols else 1)
    return out * (update.norm() / out.norm()), torch.stack(moments)


@pytest.mark.parametrize("iteration", ITERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(iteration, shape):
    """A random matrix with singular values spread over a decade keeps its singular vectors and loses its spectrum."""
    u, _, v = torch.linalg.svd(stack(*shape), full_matrices=False)
    x = 7.0 * u @ (torch.linspace(1.0, 0.1, min(shape), dtype=torch.float64)[:, None] * v)
    y = orthogonalize(x, iteration)
    values = torch.linalg.svdvals(y)
    # Keller Jordan's quintic does not converge: it wanders between about 0.68 and 1.2 by design.
    low, high = (0.85, 1.15) if iteration == "polar_express" else (0.65, 1.3)
    assert low < values.min() and values.max() < high
    exact = reference_orthogonalize(x)
    assert torch.cosine_similarity(y.flatten(1), exact.flatten(1)).min() > 0.97
    middle = u.mT @ y @ v.mT  # the singular vectors are exact whatever the iteration does to the values
    torch.testing.assert_close(middle, torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("iteration", ITERATIONS)
def test_scale_of_the_gradient_does_not_matter(iteration):
    x = stack(16, 24)
    torch.testing.assert_close(orthogonalize(x * 50, iteration), orthogonalize(x, iteration), atol=1e-5, rtol=1e-5)


def test_reference_is_orthogonal():
    q = reference_orthogonalize(stack(5, 9))
    torch.testing.assert_close(q @ q.mT, torch.eye(5, dtype=torch.float64).expand(3, 5, 5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("iteration", ITERATIONS)
def test_a_zero_gradient_stays_zero(iteration):
    assert torch.equal(orthogonalize(torch.zeros(2, 6, 4), iteration), torch.zeros(2, 6, 4))


def test_low_precision_products_return_the_dtype_of_the_input():
    x = stack(24, 16).float()
    y = orthogonalize(x, dtype=torch.bfloat16)
    assert y.dtype == torch.float32
    assert torch.cosine_similarity(y.flatten(1), orthogonalize(x).flatten(1)).min() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_variance_matches_a_loop_and_keeps_the_norm(shape):
    second = torch.zeros(3, *second_moment_shape(*shape), dtype=torch.float64)
    slow = [torch.zeros(max(shape), dtype=torch.float64) for _ in range(3)]
    for seed in range(3):  # the running moment differs from the current one only after the first call
        lines = torch.rand(3, *second_moment_shape(*shape), dtype=torch.float64) + 0.1
        update = stack(*shape, seed=seed) * lines
        fast = normalize_variance(update, second, 0.9)
        torch.testing.assert_close(fast.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
        for i in range(3):
            expected, slow[i] = slow_normalize(update[i], slow[i], 0.9)
            torch.testing.assert_close(fast[i], expected, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(second[i].flatten(), slow[i])


@pytest.mark.parametrize("iteration", ITERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_equals_one_matrix_at_a_time(iteration, shape):
    moment_shape = second_moment_shape(*shape)
    buffers, seconds = torch.zeros(3, *shape).double(), torch.zeros(3, *moment_shape).double()
    alone = [(torch.zeros(1, *shape).double(), torch.zeros(1, *moment_shape).double()) for _ in range(3)]
    for seed in range(3):
        gradient = stack(*shape, seed=seed)
        stacked = muon_update(gradient, buffers, seconds, 0.9, 0.9, iteration, None)
        for i, (buffer, second) in enumerate(alone):
            one = muon_update(gradient[i : i + 1], buffer, second, 0.9, 0.9, iteration, None)
            torch.testing.assert_close(stacked[i], one[0], atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(buffers[i], buffer[0])
