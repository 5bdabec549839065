"""Ranks that no longer hold the same weights."""

import math

import pytest
import torch

from cognica_poe.training.parallel.divergence import find_divergence, hash_parameters, parameter_hash


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_any_changed_bit_changes_the_hash(dtype):
    values = torch.randn(5, 9).mul(3).to(dtype)
    expected = parameter_hash(values)
    assert parameter_hash(values.clone()) == expected
    raw = values.clone().view(torch.uint8).view(-1)
    for place in range(0, raw.numel(), 7):
        for bit in range(8):
            changed = raw.clone()
            changed[place] ^= 1 << bit
            assert parameter_hash(changed.view(dtype).view(5, 9)) != expected


def test_order_and_layout():
    values = torch.randn(6, 6)
    assert parameter_hash(values.T) != parameter_hash(values)
    assert parameter_hash(values.T.contiguous()) == parameter_hash(values.T)
    assert parameter_hash(values[[1, 0, 2, 3, 4, 5]]) != parameter_hash(values)


def test_hashes_do_not_depend_on_chunks(monkeypatch):
    values = torch.randn(1000)
    expected = parameter_hash(values)
    monkeypatch.setattr("cognica_poe.training.parallel.divergence._CHUNK", 64)
    assert parameter_hash(values) == expected


def test_the_differing_rank_and_parameter_are_named():
    weights = {"a": torch.randn(4), "b": torch.randn(3, 3), "c": torch.zeros(0, 2)}
    same = hash_parameters(weights.items())
    assert find_divergence([same, same, same]) is None
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed["b"].view(-1)[4] += 1e-6
    found = find_divergence([same, hash_parameters(changed.items()), same])
    assert found.ranks == [1] and found.parameters == ["b"] and str(found) == "rank 1 differs in b"
    found = find_divergence([hash_parameters(changed.items()), same, same])
    assert found.ranks == [0]


def test_nan_and_signed_zero_count_by_their_bits():
    assert parameter_hash(torch.tensor([math.nan])) == parameter_hash(torch.tensor([math.nan]))
    assert parameter_hash(torch.tensor([0.0])) != parameter_hash(torch.tensor([-0.0]))
