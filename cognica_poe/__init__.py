"""Product-of-Experts language models: data, training, analysis, release and decoding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
    from cognica_poe.release.loading import load

__version__ = "0.1.0"

__all__ = ["CognicaPoEConfig", "CognicaPoEForCausalLM", "__version__", "load"]

_HOMES = {
    "CognicaPoEConfig": "cognica_poe.modeling.configuration_cognica_poe",
    "CognicaPoEForCausalLM": "cognica_poe.modeling.modeling_cognica_poe",
    "load": "cognica_poe.release.loading",
}


def __getattr__(name: str) -> Any:
    """A public name from its module, which is imported when it is first asked for: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
