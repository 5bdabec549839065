"""Stage heads of low rank: the same model as with the whole matrices, with fewer parameters."""

import pytest
import torch

from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.planning.parameters import count_parameters
from cognica_poe.recipe.fields import ModelRecipe, Recipe
from tests.conftest import make_model

MODES = {
    "full": ("generate_prefix", {}),
    "prefix": ("generate_prefix", {"max_stages": 2}),
    "stage": ("generate_stage", {"stage": 1}),
    "wand": ("generate_wand", {"p99_bounds": [0.05, 0.05]}),
    "speculative": ("generate_speculative", {"k_draft": 3}),
    "parallel": ("generate_parallel_composition", {"stages": [0, 2]}),
}


def both():
    """A model of rank 5 and one with its matrices written out."""
    thin = make_model(stage_head_rank=5)
    full = make_model()
    state = {name: value for name, value in thin.state_dict().items() if not name.startswith("lm_head_stages")}
    state |= {f"lm_head_stages.{k}.weight": thin.stage_weight(k) for k in range(3)}
    full.load_state_dict(state)
    return thin, full


def test_logits_are_those_of_the_written_out_matrices():
    thin, full = both()
    ids = torch.randint(97, (2, 20))
    for stage in range(3):
        torch.testing.assert_close(thin.forward_stage(ids, stage), full.forward_stage(ids, stage), atol=1e-10, rtol=0)
    torch.testing.assert_close(thin(ids).logits, full(ids).logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_decodes_the_same(mode):
    thin, full = both()
    ids = torch.randint(97, (1, 12))
    method, options = MODES[mode]
    texts = [getattr(model, method)(ids, max_new_tokens=16, **options) for model in (thin, full)]
    assert torch.equal(*texts)


def test_saved_and_loaded(tmp_path):
    thin, _ = both()
    thin.save_pretrained(tmp_path)
    again = CognicaPoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.randint(97, (1, 12))
    assert again.config.stage_head_rank == 5
    assert torch.equal(again(ids).logits, thin(ids).logits)


def test_parameters():
    shape = {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 2}
    model = ModelRecipe(**shape, num_key_value_heads=2, poe_stage_layers=(3, 3, 3, 3), stage_head_rank=32)
    counts = count_parameters(Recipe("thin", model))
    assert counts["groups"]["lm_head_stages"] == 4 * 32 * (1024 + 128)


@pytest.mark.parametrize(("rank", "own"), [(-1, True), (48, True), (5, False)])
def test_a_rank_that_makes_no_head(rank, own):
    with pytest.raises(ValueError, match=f"stage_head_rank {rank} "):
        CognicaPoEConfig(hidden_size=48, num_hidden_layers=2, stage_head_rank=rank, per_stage_head=own)
