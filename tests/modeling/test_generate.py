"""generate() reaches every mode; logits processors mean what they mean in transformers."""

import pytest
import torch
from transformers import GenerationConfig, MinLengthLogitsProcessor

from tests.conftest import make_model

IDS = torch.tensor([[5, 9, 2, 9, 5, 9], [7, 7, 3, 1, 4, 2]])
MODES = {
    "full": ("generate_prefix", {}),
    "prefix": ("generate_prefix", {"max_stages": 2}),
    "stage": ("generate_stage", {"stage": 1}),
    "wand": ("generate_wand", {"p99_bounds": [0.8, 0.4]}),
    "speculative": ("generate_speculative", {"drafter": "lookup", "k_draft": 3}),
    "parallel": ("generate_parallel_composition", {"stages": [0, 2]}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "temperature": 1.3, "top_k": 20, "seed": 3}])
def test_modes_through_generate(mode, settings):
    model, (method, options) = make_model(), MODES[mode]
    expected = getattr(model, method)(IDS, **options, **settings, max_new_tokens=12)
    assert torch.equal(model.generate(IDS, poe_mode=mode, poe_options=options, **settings, max_new_tokens=12), expected)
    config = GenerationConfig(poe_mode=mode, poe_options=options, max_new_tokens=12, **{**settings, "seed": None})
    seed = {"seed": settings["seed"]} if settings else {}
    assert torch.equal(model.generate(input_ids=IDS, generation_config=config, **seed), expected)


def test_the_released_folder_carries_the_mode(tmp_path):
    model = make_model()
    model.generation_config = GenerationConfig(poe_mode="stage", poe_options={"stage": 0})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    expected = model.generate_stage(IDS, 0, max_new_tokens=9)
    assert torch.equal(again.generate(IDS, max_new_tokens=9), expected)
    assert not torch.equal(again.generate(IDS, poe_mode="full", max_new_tokens=9), expected)


def test_no_mode_is_the_loop_of_transformers():
    model = make_model()
    plain = model.generate(IDS, do_sample=False, max_new_tokens=15)
    assert torch.equal(plain, model.generate(IDS, poe_mode="full", max_new_tokens=15))
    assert torch.equal(plain, model.generate(IDS, poe_mode="full", max_length=21))


@pytest.mark.parametrize("mode", ["full", "speculative"])
@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 1.6}, {"logits_processor": [MinLengthLogitsProcessor(14, 66)], "eos_token_id": 66}],
)
def test_processors_mean_what_they_mean_in_transformers(mode, settings):
    model = make_model()
    changed = model.generate(IDS, do_sample=False, max_new_tokens=20, pad_token_id=0, **settings)
    assert torch.equal(model.generate(IDS, poe_mode=mode, max_new_tokens=20, pad_token_id=0, **settings), changed)
    settings = {name: value for name, value in settings.items() if name == "eos_token_id"}
    assert not torch.equal(model.generate(IDS, do_sample=False, max_new_tokens=20, pad_token_id=0, **settings), changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poe_mode": "beam"}, "poe_mode 'beam' does not exist; choose one of full, prefix"),
        ({"poe_mode": "full", "num_beams": 4}, "does not know num_beams"),
        ({"poe_mode": "wand", "penalty_alpha": 0.6}, "does not know penalty_alpha"),
        ({"poe_mode": "full", "repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(IDS, max_new_tokens=4, **settings)
