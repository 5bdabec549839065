"""Wrong requests: every mistake is one line that says what is wrong, before anything is computed."""

import pytest
import torch

from cognica_poe.modeling.margins_cognica_poe import leaving_margins, wand_bounds
from tests.conftest import make_model

PROMPT = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1, 2], {}, "pass a tensor"),
        (torch.arange(4), {}, r"shape \[4\]"),
        (torch.rand(1, 4), {}, "float32"),
        (torch.empty(1, 0, dtype=torch.int64), {}, "prompt is empty"),
        (torch.tensor([[1, 97]]), {}, "token id 97 is outside the vocabulary of 97"),
        (torch.tensor([[-1, 5]]), {}, "token id -1 is outside"),
        (PROMPT, {"max_new_tokens": 249}, "8 prompt tokens and 249 new ones make 257, more than the context of 256"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (PROMPT, {"attention_mask": torch.ones(1, 7)}, "does not fit"),
        (PROMPT, {"attention_mask": torch.zeros(1, 8)}, "prompt of row 0 is empty"),
        (PROMPT, {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])}, "not left padded"),
        (PROMPT, {"temperature": 0.7, "top_k": 5}, "temperature, top_k needs do_sample=True"),
        (PROMPT, {"do_sample": True, "temperature": 0.0}, "temperature is 0.0"),
        (PROMPT, {"do_sample": True, "top_k": 0}, "top_k is 0"),
        (PROMPT, {"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_common_arguments(model, ids, options, message):
    for mode in (
        lambda: model.generate_prefix(ids, 2, **options),
        lambda: model.generate_stage(ids, 1, **options),
        lambda: model.generate_wand(ids, p99_bounds=[1.0, 1.0], **options),
        lambda: model.generate_speculative(ids, **options),
        lambda: model.generate_parallel_composition(ids, (0, 2), **options),
    ):
        with pytest.raises(ValueError, match=message) as error:
            mode()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("stage", [-1, 3, 1.0, True])
def test_stages_that_do_not_exist(model, stage):
    for mode in (
        lambda: model.generate_prefix(PROMPT, stage + 1 if stage is not True else 4),
        lambda: model.generate_stage(PROMPT, stage),
        lambda: model.generate_speculative(PROMPT, draft_stage=stage),
        lambda: model.generate_parallel_composition(PROMPT, (0, stage)),
    ):
        with pytest.raises(ValueError, match="does not exist: the model has 3 stages"):
            mode()


def test_a_stage_cannot_be_composed_with_itself(model):
    with pytest.raises(ValueError, match=r"stages \[1, 1\] names a stage twice"):
        model.generate_parallel_composition(PROMPT, (1, 1))


@pytest.mark.parametrize("k_draft", [0, -1, 2.5])
def test_k_draft(model, k_draft):
    with pytest.raises(ValueError, match="k_draft is"):
        model.generate_speculative(PROMPT, k_draft=k_draft)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, float("nan"))])
def test_stage_weights(model, weights):
    with pytest.raises(ValueError, match="one non-negative weight per stage"):
        model.generate_parallel_composition(PROMPT, (0, 2), weights)


def test_wand_bounds(model):
    with pytest.raises(ValueError, match="no WAND bounds for 3 stages"):
        model.generate_wand(PROMPT)
    for bounds in ([1.0], [1.0, float("nan")], [1.0, -1.0]):
        with pytest.raises(ValueError, match="p99_bounds"):
            model.generate_wand(PROMPT, p99_bounds=bounds)
    with pytest.raises(ValueError, match="safety is -1"):
        model.generate_wand(PROMPT, safety=-1, p99_bounds=[1.0, 1.0])


def test_where_wand_bounds_come_from():
    four = make_model(num_hidden_layers=4, poe_stage_layers=[1, 1, 1, 1])
    config, fallback = four.config, four.POE_WAND_P99_BOUNDS_PER_STAGE_HEAD
    assert wand_bounds(config, fallback, 1.0, None) == [3.2557, 1.5259, 1.1327]
    config.poe_wand_p99_bounds_per_stage_head = [3.0, 2.0, 1.0]
    assert wand_bounds(config, fallback, 1.0, None) == [3.0, 2.0, 1.0]
    assert wand_bounds(config, fallback, 1.0, [1, 1, 1]) == [1.0, 1.0, 1.0]


def test_a_guarantee_is_a_set_of_margins(model):
    margins = {"0.9": [0.3, 0.1], "0.99": [0.8, 0.4]}
    stated = make_model(poe_agreement_margins=margins, poe_direct_p99_bounds=[1.5, 0.5])
    assert leaving_margins(stated.config, (), 1.0, None, None, 0.99, None) == ([0.8, 0.4], [])
    new = {"max_new_tokens": 12, "return_stages_used": True}
    for guarantee, chosen in ((0.9, margins["0.9"]), (0.99, margins["0.99"])):
        ids, used = stated.generate_wand(PROMPT, guarantee=guarantee, **new)
        # WAND adds bounds up: those that give the same margins
        again, same = stated.generate_wand(PROMPT, p99_bounds=[chosen[0] - chosen[1], chosen[1]], **new)
        assert torch.equal(ids, again) and torch.equal(used, same)
        assert torch.equal(stated.generate_wand(PROMPT, margins=chosen, max_new_tokens=12), ids)
    for options, message in (
        ({"guarantee": 0.999}, "calibrated for 0.9, 0.99"),
        ({"guarantee": 0.99, "safety": 2.0}, "leave safety out"),
        ({"guarantee": 0.99, "p99_bounds": [1.0, 1.0]}, "leave p99_bounds out"),
        ({"guarantee": 0.99, "margins": [1.0, 1.0]}, "leave guarantee out"),
        ({"margins": [1.0]}, "need 2 non-negative"),
        ({"margins": [1.0, float("nan")]}, "need 2 non-negative"),
    ):
        with pytest.raises(ValueError, match=message):
            stated.generate_wand(PROMPT, **options)
    with pytest.raises(ValueError, match="no poe_agreement_margins"):
        model.generate_wand(PROMPT, guarantee=0.99)
    for wrong in ({"1.5": [1.0, 1.0]}, {"high": [1.0, 1.0]}, {"0.9": [1.0]}, {"0.9": [1.0, -1.0]}):
        with pytest.raises(ValueError, match="poe_agreement_margins"):
            make_model(poe_agreement_margins=wrong)


def test_models_without_trained_stages():
    plain = make_model(poe_mode="none")
    with pytest.raises(ValueError, match="poe_mode is none"):
        plain.generate_wand(PROMPT)
    with pytest.raises(ValueError, match="poe_mode is none"):
        plain.generate_prefix(PROMPT)


def test_one_stage_makes_all_modes_equal():
    model = make_model(poe_stage_layers=[5])
    full = model.generate(PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for ids in (
        model.generate_prefix(PROMPT, max_new_tokens=6),
        model.generate_stage(PROMPT, 0, max_new_tokens=6),
        model.generate_wand(PROMPT, max_new_tokens=6),
        model.generate_speculative(PROMPT, max_new_tokens=6),
        model.generate_parallel_composition(PROMPT, (0,), max_new_tokens=6),
    ):
        assert ids.tolist() == full.tolist()
