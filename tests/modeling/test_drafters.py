"""Every drafter, in every precision, leaves the text as plain cached decoding writes it."""

import pytest
import torch

from cognica_poe.modeling.drafting_cognica_poe import DRAFTERS, LookupDrafter, NgramText
from cognica_poe.modeling.engine_cognica_poe import Engines
from cognica_poe.modeling.linears_cognica_poe import DenseLinear, Int4Linear, Int8Linear
from cognica_poe.modeling.speculation_cognica_poe import verify
from tests.conftest import make_model
from tests.modeling.test_speculation import agreeing_model, fifty_prompts

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
ROUNDING = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def plain(model, ids, **options):
    return model.generate_prefix(ids, **options)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=ROUNDING.values())
def test_greedy_text_is_bit_identical(dtype, drafter):
    model = agreeing_model(0, dtype=dtype, **WIDE)
    ids, mask = fifty_prompts(0)
    ids, mask = ids[:4, :40], mask[:4, :40]
    mask[:, -1] = 1
    expected = plain(model, ids, attention_mask=mask, max_new_tokens=60)
    for k_draft in (1, 3, 7, 12):
        for confidence in (0.0, 0.3):
            output, drafts = model.generate_speculative(
                ids, 0, k_draft, True, drafter, confidence, attention_mask=mask, max_new_tokens=60
            )
            assert torch.equal(output, expected), (k_draft, confidence)
            assert drafts["proposed"] > drafts["accepted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=ROUNDING.values())
def test_greedy_text_is_bit_identical_for_fifty_prompts_of_200_tokens(dtype):
    model = agreeing_model(1, dtype=dtype, max_position_embeddings=512, **WIDE)
    ids, mask = fifty_prompts(1)
    batches = [(rows, part) for rows, part in zip(ids.split(10), mask.split(10), strict=True)]
    batches += [(ids[row : row + 1, mask[row].bool()], None) for row in (0, 3, 7)]  # one row has kernels of its own
    for rows, part in batches:
        options = {"attention_mask": part, "max_new_tokens": 200}
        expected = plain(model, rows, **options)
        for drafter in DRAFTERS:
            assert torch.equal(model.generate_speculative(rows, 0, 7, drafter=drafter, **options), expected), drafter


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=ROUNDING.values())
def test_compiled_graphs_keep_bit_identity(dtype):
    model = agreeing_model(0, dtype=dtype, **WIDE)
    ids = fifty_prompts(0)[0][1:3, :40]
    loose = plain(model, ids, max_new_tokens=40)
    model.prepare_decoding(compile=True, width=4)
    expected = plain(model, ids, max_new_tokens=40)
    assert model.decoding_seconds_compiled() > 0
    assert (expected == loose).float().mean() > 0.5  # other kernels round otherwise; a wrong graph shares nothing
    for drafter in DRAFTERS:
        assert torch.equal(model.generate_speculative(ids, 0, 7, drafter=drafter, max_new_tokens=40), expected), drafter
    model.prepare_decoding()


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 4, "temperature": 1.2}])
def test_lookup_draws_the_tokens_of_the_stage_drafter(monkeypatch, settings):
    monkeypatch.setattr(LookupDrafter, "adds_token", True)  # rounds as those of the other
    model = agreeing_model(0)
    ids = fifty_prompts(0)[0][:3, :30]
    ids[:, 10:20] = ids[:, :10]
    options = {"return_acceptance": True, "max_new_tokens": 50, **settings}
    for confidence in (0.0, 0.05):
        by_stage = model.generate_speculative(ids, 0, 6, drafter="stage", draft_confidence=confidence, **options)
        by_lookup = model.generate_speculative(ids, 0, 6, drafter="lookup", draft_confidence=confidence, **options)
        assert torch.equal(by_stage[0], by_lookup[0]) and by_stage[1] == by_lookup[1]


def test_lookup_needs_fewer_passes_on_a_text_that_repeats(monkeypatch):
    from cognica_poe.modeling.stages_cognica_poe import StageCache

    model, passes, run = agreeing_model(0, poe_stage_layers=[5]), [0], StageCache._run
    model.prepare_decoding(width=8)
    monkeypatch.setattr(StageCache, "_run", lambda *a: (passes.__setitem__(0, passes[0] + 1), run(*a))[1])
    ids = fifty_prompts(0)[0][:1]
    found = {}
    for drafter in ("stage", "lookup"):
        passes[0] = 0
        found[drafter] = model.generate_speculative(ids, 0, 7, drafter=drafter, max_new_tokens=150), passes[0]
    assert torch.equal(found["stage"][0], found["lookup"][0])
    assert found["lookup"][1] < found["stage"][1]


def test_confidence_shortens_drafts_and_raises_acceptance():
    model = agreeing_model(0, 0.6)
    ids = fifty_prompts(0)[0][:8]
    counts = [
        model.generate_speculative(ids, 0, 8, True, "stage", confidence, max_new_tokens=40)[1]
        for confidence in (0.0, 0.5)
    ]
    assert counts[1]["proposed"] < counts[0]["proposed"]
    assert counts[1]["acceptance"] > counts[0]["acceptance"]


def test_guesses_follow_the_longest_ngram_and_loop():
    text = NgramText([1, 2, 3, 9, 2, 3, 4, 1, 2, 3])
    assert text.guess([], 3) == [9, 2, 3]
    assert text.guess([4], 4) == [1, 2, 3, 4]
    assert text.guess([77], 4) == []
    loop = NgramText([5, 6, 5, 6])
    assert loop.guess([], 5) == [5, 6, 5, 6, 5]
    assert loop.guess([5], 3) == [6, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "tolerance"), [(DenseLinear, 0.01), (Int8Linear, 0.02), (Int4Linear, 0.2)])
def test_quantised_products_are_near_the_exact_one(form, tolerance, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator).to(dtype)
    x = torch.randn(2, 5, 128, generator=generator).to(dtype)
    found, exact = form(weight)(x), x.double() @ weight.double().T
    assert found.shape == (2, 5, 96) and found.dtype == dtype
    assert (found.double() - exact).norm() / exact.norm() < tolerance


def test_both_layouts_of_four_bits_hold_the_same_weights():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    portable = Int4Linear(weight.float()).dense(torch.float32)
    native = Int4Linear(weight)
    assert native.native
    unpacked = native(torch.eye(64, dtype=torch.bfloat16)).float().T
    torch.testing.assert_close(unpacked, portable, rtol=0.02, atol=0.02)


def test_training_on_rearranges_the_weights():
    model = agreeing_model(0)
    ids = fifty_prompts(0)[0][:1]
    before = plain(model, ids, max_new_tokens=20)
    engine = Engines.of(model).get(model)
    assert Engines.of(model).get(model) is engine
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
    assert Engines.of(model).get(model) is not engine
    after = plain(model, ids, max_new_tokens=20)
    assert not torch.equal(before, after)
    assert torch.equal(after, model.generate(ids, do_sample=False, max_new_tokens=20))


def test_auto_gives_the_same_text_and_remembers_its_choice():
    model = agreeing_model(0, dtype=torch.bfloat16, **WIDE)
    ids = fifty_prompts(0)[0][:1, :30]
    expected = plain(model, ids, max_new_tokens=30)
    for _ in range(2):
        assert torch.equal(model.generate_speculative(ids, drafter="auto", max_new_tokens=30), expected)
    ((key, choice),) = Engines.of(model).measured.items()
    assert key == (1, False, 0, verify) and (choice[0] in DRAFTERS or choice == (None, 0))


def test_auto_decodes_plainly_where_drafts_are_never_accepted():
    model = make_model(dtype=torch.float32, **WIDE)
    with torch.no_grad():  # stage 0 always proposes token 0, which the pool never takes
        model.lm_head_stages[0].weight.zero_()
        for block in model.transformer.h[:2]:
            block.mlp.c_proj.weight.mul_(0)
    ids = fifty_prompts(0)[0][:1, :30]
    output, counts = model.generate_speculative(ids, drafter="auto", max_new_tokens=40, return_acceptance=True)
    assert torch.equal(output, plain(model, ids, max_new_tokens=40))
    if Engines.of(model).measured[1, False, 0, verify][0] is None:
        assert counts["rounds"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafter": "eagle"}, "drafter 'eagle' does not exist; choose one of stage, int8, int4, lookup, auto"),
        ({"draft_confidence": 1.0}, "draft_confidence is 1.0; it must be in"),
        ({"drafter": "int4"}, "multiples of 32, not 48"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate_speculative(torch.tensor([[1, 2, 3]]), **arguments)


def test_width_below_one():
    with pytest.raises(ValueError, match="width is 0"):
        make_model().prepare_decoding(width=0)
