"""What a release folder says of its model and tokenizer, compared with its weights before any of it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cognica_poe.errors import UserError
from cognica_poe.files import read_json
from cognica_poe.recipe.fields import ModelRecipe
from cognica_poe.recipe.rules import field_ranges

if TYPE_CHECKING:
    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig

WEIGHTS = "model.safetensors"


def check_contents(folder: Path) -> None:
    """Raise UserError for a file that cannot be read, describes no model of ours, or contradicts another one.

    No tensor is read: names, shapes and dtypes stand in the header of the weights.
    """
    from cognica_poe.data.tokenizer import load_tokenizer

    folder = Path(folder)
    config = _config(folder / "config.json")
    _check_weights(folder / WEIGHTS, config)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'} has {tokenizer.vocab_size} ids, config.json says {config.vocab_size}: it is "
            "not this model's tokenizer; copy the release again"
        )
    _object(folder / "tokenizer_config.json")
    if (folder / "generation_config.json").exists():
        _check_generation(folder / "generation_config.json")


def _object(file: Path) -> dict[str, Any]:
    values = read_json(file, "release file")
    if not isinstance(values, dict):
        raise UserError(f"release file {file} holds no object; copy the release again")
    return values


def _config(file: Path) -> CognicaPoEConfig:
    from huggingface_hub.errors import StrictDataclassError

    from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig

    values = _object(file)
    if values.get("model_type") != CognicaPoEConfig.model_type:
        raise UserError(f"{file} is of model_type {values.get('model_type')!r}, not {CognicaPoEConfig.model_type}")
    for name, bounds in field_ranges(ModelRecipe).items():  # so that no model is built that no machine holds
        value = values.get(name)
        if problem := bounds.problem(tuple(value) if isinstance(value, list) else value):
            raise UserError(f"{file}: {name} {problem}")
    for name, default in {**CognicaPoEConfig().to_dict(), "dtype": "float32"}.items():
        if name in values and not _alike(values[name], default):
            raise UserError(f"{file}: {name} is {values[name]!r:.40}, where {default!r:.40} is usual; copy it again")
    try:
        config = CognicaPoEConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, StrictDataclassError) as error:
        raise UserError(f"{file} describes no model: {_last_line(error)}; copy the release again") from error
    for name, value in {**config.to_dict(), "tie_word_embeddings": False}.items():
        if name in values and values[name] != value:
            raise UserError(f"{file}: {name} is {values[name]!r:.40}, which follows as {value!r:.40}; copy it again")
    return config


def _alike(value: Any, usual: Any) -> bool:
    """Whether ``value`` is of the type of ``usual``; what is usually None may be anything."""
    if isinstance(usual, bool) or isinstance(value, bool):
        return usual is None or isinstance(value, bool) == isinstance(usual, bool)
    for kind in (int | float, str, list, dict):
        if isinstance(usual, kind):
            return value is None or isinstance(value, kind)
    return True


def _check_weights(file: Path, config: CognicaPoEConfig) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  # not a mapping
            stored = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} holds no weights that can be read ({error}); copy the release again") from error
    try:
        with torch.device("meta"):
            model = CognicaPoEForCausalLM(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file.with_name('config.json')} describes no model: {_last_line(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*expected, *stored}):
        if name not in stored or name not in expected:
            where = "lacks" if name not in stored else "holds"
            problem = f"{where} {name}, against config.json"
        elif stored[name][0] != expected[name]:
            problem = f"holds {name} as {list(stored[name][0])}, config.json asks for {list(expected[name])}"
        elif stored[name][1] not in ("F64", "F32", "F16", "BF16"):
            problem = f"holds {name} as {stored[name][1]}, which is no floating-point number"
        else:
            continue
        raise UserError(f"{file} {problem}: they do not belong together; copy the release again")


def _check_generation(file: Path) -> None:
    from transformers import GenerationConfig

    values = _object(file)
    try:
        GenerationConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is no generation config: {_last_line(error)}; copy the release again") from error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
