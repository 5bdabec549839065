"""An OpenAI-compatible server: transformers' own, taught to load this package's model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.recipe.rules import require_ranges
from cognica_poe.serving.options import ServerOptions


def serve(checkpoint: Path, options: ServerOptions, log: Callable[[str], None]) -> None:
    """Serve a release folder over HTTP until interrupted: /v1/completions, /v1/chat/completions, /v1/models, /health.

    Raises UserError for what is no release folder or a damaged one, for missing packages of the extra ``serve`` and a
    wrong option.
    """
    from cognica_poe.release.export import check_release

    check_release(checkpoint, to_load=True)
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'cognica-poe[serve]'")
    require_ranges(options, "serve: --")
    _require_device(options.device)
    from transformers.cli.serve import Serve

    register_model(generation_defaults(options))
    log(f"serving {checkpoint} at http://{options.host}:{options.port}/v1 (Ctrl-C ends)")
    Serve(
        force_model=str(checkpoint),
        host=options.host,
        port=options.port,
        device=options.device,
        dtype=options.dtype,
    )


def _require_device(name: str) -> None:
    """Raise UserError for a device that is none, or that this machine does not have."""
    import torch

    try:
        kind = "cpu" if name == "auto" else torch.device(name).type
    except RuntimeError as error:
        raise UserError(f"serve: --device {name!r} names no device; use auto, cpu or cuda:0") from error
    if kind != "cpu" and not (kind in ("cuda", "mps", "xpu") and getattr(torch, kind).is_available()):
        raise UserError(f"serve: --device {name!r} is not there on this machine; use auto or cpu")


def generation_defaults(options: ServerOptions) -> dict[str, Any]:
    """What a served model's generation config is told; nothing when no mode is asked for."""
    if options.mode is None:
        return {}
    known: dict[str, dict[str, Any]] = {
        "prefix": {"max_stages": 1 if options.stages is None else options.stages},
        "stage": {"stage": options.stage or 0},
        "exit": {"layer": options.layer},
        "speculative": {
            **({"draft_stage": options.stage or 0} if options.layer is None else {"draft_layer": options.layer}),
            "drafter": options.drafter or "auto",
            "k_draft": 7 if options.k_draft is None else options.k_draft,
        },
    }
    return {"poe_mode": options.mode, "poe_options": known.get(options.mode, {})}


def register_model(generation: dict[str, Any]) -> None:
    """Make the model one of transformers' own, by name; loaded ones get ``generation`` into their generation config."""
    import transformers

    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

    class Served(CognicaPoEForCausalLM):
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # passes all of them on
            model = CognicaPoEForCausalLM.from_pretrained(*args, **kwargs)
            model.generation_config.update(allow_custom_entries=True, **generation)
            return model

    transformers.AutoConfig.register(CognicaPoEConfig.model_type, CognicaPoEConfig, exist_ok=True)
    setattr(transformers, CognicaPoEForCausalLM.__name__, Served)  # where `transformers serve` looks classes up
