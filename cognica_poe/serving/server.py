"""An OpenAI-compatible server: transformers' own, taught to load this package's model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import tyro

from cognica_poe.cli.progress import log
from cognica_poe.errors import UserError


def serve(
    checkpoint: tyro.conf.Positional[Path],
    mode: Literal["full", "prefix", "stage", "wand", "speculative"] | None = None,
    stages: int = 1,
    stage: int = 0,
    drafter: Literal["stage", "int8", "int4", "lookup", "auto"] = "auto",
    k_draft: int = 7,
    host: str = "localhost",
    port: int = 8000,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
) -> None:
    """Serve a release folder over HTTP: /v1/completions, /v1/chat/completions, /v1/models, /health.

    This is `transformers serve`, which by itself loads no model that it does not ship.

    Args:
        checkpoint: Release folder.
        mode: Mode that answers; what the release's generation config says when omitted.
        stages: For mode prefix: how many stages.
        stage: For modes stage and speculative: which stage speaks or drafts, counted from 0.
        drafter: For mode speculative: who drafts.
        k_draft: For mode speculative: drafts per round.
        host: Address to listen at.
        port: Port to listen at.
        device: Where the model runs, such as cuda:0.
        dtype: Dtype of the weights; that of the release when auto.
    """
    if not (checkpoint / "config.json").is_file():
        raise UserError(f"serve: {checkpoint} is no release folder (config.json is missing)")
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'cognica-poe[serve]'")
    if k_draft < 1:
        raise UserError(f"serve: --k-draft is {k_draft}; it must be at least 1")
    options = {
        "prefix": {"max_stages": stages},
        "stage": {"stage": stage},
        "speculative": {"draft_stage": stage, "drafter": drafter, "k_draft": k_draft},
    }
    from transformers.cli.serve import Serve

    register_model({"poe_mode": mode, "poe_options": options.get(mode, {})} if mode else {})
    log(f"serving {checkpoint} at http://{host}:{port}/v1 (Ctrl-C ends)")
    Serve(force_model=str(checkpoint), host=host, port=port, device=device, dtype=dtype)


def register_model(generation: dict[str, Any]) -> None:
    """Make the model one of transformers' own, by name; loaded ones get ``generation`` into their generation config."""
    import transformers

    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

    class Served(CognicaPoEForCausalLM):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            model = CognicaPoEForCausalLM.from_pretrained(*args, **kwargs)
            model.generation_config.update(allow_custom_entries=True, **generation)
            return model

    transformers.AutoConfig.register(CognicaPoEConfig.model_type, CognicaPoEConfig, exist_ok=True)
    transformers.CognicaPoEForCausalLM = Served
