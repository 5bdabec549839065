"""Wrong requests: every mistake is one line that says what is wrong, before anything is computed."""

import pytest
import torch

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
    assert four._wand_bounds(None, 1.0) == [3.2557, 1.5259, 1.1327]
    four.config.poe_wand_p99_bounds_per_stage_head = [3.0, 2.0, 1.0]
    assert four._wand_bounds(None, 1.0) == [3.0, 2.0, 1.0]
    assert four._wand_bounds([1, 1, 1], 1.0) == [1.0, 1.0, 1.0]


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
