import pytest
import torch

from cognica_poe.analysis.heads import head_geometry, readable
from tests.analysis.helpers import ByteTokenizer
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
    assert result.top_tokens[2] == [readable(TOKENIZER.bytes_of(index)) for index in (5, 7, 11)]
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


def test_other_gauges_do_not_depend_on_how_heads_are_split():
    model = small_model()
    before = head_geometry(model, TOKENIZER)
    moved = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():  # the same function, another split
        model.lm_head.weight.add_(moved)
        for head in model.lm_head_stages:
            head.weight.sub_(moved)
    after = head_geometry(model, TOKENIZER)
    assert after.norm != pytest.approx(before.norm, rel=1e-3)
    for gauge in ("folded", "centred"):
        one, other = getattr(before, gauge), getattr(after, gauge)
        assert other.norm == pytest.approx(one.norm) and other.unique_share == pytest.approx(one.unique_share, abs=1e-8)
        for row, expected in zip(other.alignment, one.alignment, strict=True):
            assert row == pytest.approx(expected, abs=1e-6)
    assert before.centred.unique_share[-1] == pytest.approx(0.0, abs=1e-8)  # centred heads sum to zero
    assert before.folded.unique_share[-1] > 1e-3


def test_tokens_are_spelled_out():
    assert (
        readable(b" na\xc3\xafve") == " naïve"
        and readable(b"\xc3") == r"\xc3"
        and readable(b"\xe2\x82x") == r"\xe2\x82x"
    )
    assert readable(b"a\n\t") == r"a\n\t" and readable(b"\xe2\x80\xae") == r"\u202e" and readable(b"") == ""
