import pytest
import torch

from cognica_poe.analysis.bits_per_byte import measure_paths
from cognica_poe.analysis.heads import head_geometry, perturb_heads
from tests.analysis.helpers import ByteTokenizer, bpb, make_texts
from tests.conftest import make_model

TOKENIZER = ByteTokenizer()


def small_model(**changes):
    return make_model(max_position_embeddings=24, **changes)


def test_alignment_equals_a_full_svd():
    model = small_model()
    result = head_geometry(model, TOKENIZER)
    svd = [torch.linalg.svd(head.weight.detach(), full_matrices=False) for head in model.lm_head_stages]
    for i, (left, _, right) in enumerate(svd):
        for j, (other_left, _, other_right) in enumerate(svd):
            expected = left[:, 0] @ other_left[:, 0] * torch.sign(right[0] @ other_right[0])
            assert result.alignment[i][j] == pytest.approx(float(expected), abs=1e-9)
    assert result.norm == pytest.approx([float(head.weight.detach().norm()) for head in model.lm_head_stages])


def test_unique_share_equals_gram_schmidt():
    model = small_model()
    with torch.no_grad():
        first, second, third = (head.weight for head in model.lm_head_stages)
        second.add_(2 * first)
        third.copy_(first - 3 * second)
    basis, shares = [], []
    for head in model.lm_head_stages:
        vector = head.weight.detach().flatten()
        rest = vector - sum((unit @ vector) * unit for unit in basis)
        shares.append(float(rest.square().sum() / vector.square().sum()))
        basis.append(rest / rest.norm())
    assert head_geometry(model, TOKENIZER).unique_share == pytest.approx(shares, abs=1e-9)
    assert shares[2] < 1e-9 < shares[1] < 0.5 < shares[0]


def test_a_scaled_copy_is_aligned_and_a_mirrored_one_is_not():
    model = small_model()
    with torch.no_grad():
        model.lm_head_stages[1].weight.copy_(2 * model.lm_head_stages[0].weight)
        left, right = torch.zeros(97, dtype=torch.float64), torch.ones(48, dtype=torch.float64)
        left[[5, 7, 11]] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
        model.lm_head_stages[2].weight.copy_(-left[:, None] * right)
    result = head_geometry(model, TOKENIZER, tokens=3)
    assert result.alignment[0][1] == pytest.approx(1.0)
    assert result.top_tokens[2] == [TOKENIZER.decode([index]) for index in (5, 7, 11)]
    with torch.no_grad():
        model.lm_head_stages[1].weight.neg_()  # -u with v, or u with -v: opposite
    assert head_geometry(model, TOKENIZER).alignment[0][1] == pytest.approx(-1.0)


def test_zero_heads_have_no_geometry():
    model = small_model()
    with torch.no_grad():
        model.lm_head_stages[1].weight.zero_()
    result = head_geometry(model, TOKENIZER)
    assert result.alignment[1] == [None] * 3 and result.unique_share[1] is None and result.top_tokens[1] == []
    assert result.alignment[0][2] is not None and result.unique_share[0] == 1.0
    for changes in ({"per_stage_head": False}, {"poe_mode": "none"}, {"poe_stage_layers": [5]}):
        assert head_geometry(small_model(**changes), TOKENIZER) is None


def test_perturbations_equal_an_edited_model():
    model, texts = small_model(), make_texts(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = perturb_heads(model, TOKENIZER, texts, betas=(1.0, 2.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(result.stage, result.beta) for result in results] == [
        (0, 0.0),
        (1, 0.0),
        (2, 0.0),
        (None, 1.0),
        (None, 2.0),
    ]
    base = bpb(measure_paths(model, TOKENIZER, texts).sums, "full")
    edited = small_model()
    with torch.no_grad():
        edited.lm_head_stages[1].weight.zero_()
    assert results[1].value == pytest.approx(bpb(measure_paths(edited, TOKENIZER, texts).sums, "full") - base)
    assert results[1].low <= results[1].value <= results[1].high
    assert results[3].value == results[3].low == results[3].high == 0.0
    assert results[4].value != 0.0
