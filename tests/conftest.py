"""Shared fixtures: small models with every parameter away from its initial zero, one thread for repeatability."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> CognicaPoEForCausalLM:
    """A random tiny model in evaluation mode; every parameter is perturbed, so that nothing hides behind a zero."""
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "short_window": 16,
        "poe_stage_layers": [2, 1, 2],
    }
    torch.manual_seed(seed)
    model = CognicaPoEForCausalLM(CognicaPoEConfig(**{**shape, **changes})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tiny_model() -> CognicaPoEForCausalLM:
    return make_model()
