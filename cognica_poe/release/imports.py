"""Checkpoints that others made, as releases of ours: a folder of safetensors with config.json, or nanochat's.

Names are mapped, and every tensor must be known and have its shape; what is missing or unexpected is listed. Pickles
are read only where that is asked for, and then for tensors alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cognica_poe.data.build import build
from cognica_poe.data.tokenizer import copy_tokenizer, load_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.files import read_json, require_apart, require_replaceable, safe_name, sha256_file
from cognica_poe.leftovers import scratch_folder
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import ModelRecipe
from cognica_poe.recipe.rules import field_ranges
from cognica_poe.training.precision import default_device

Log = Callable[[str], None]
MEASURED_BYTES = 200_000
_PREFIXES = ("_orig_mod.", "module.", "model.")
"""What wrappers put before a name: torch.compile, data parallelism, a class around the model."""
_TABLES = re.compile(r"(?:.*\.)?(?:cos|sin|inv_freq)")
"""Tables of the rotation, which follow from the configuration."""
_NEUTRAL = ("smear_gate.weight", "smear_lambda", "backout_lambda")
"""Came to nanochat in March 2026; at zero a model is what it was without them."""
_LISTED = 5  # names of a message
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


@dataclass(frozen=True)
class Foreign:
    """A checkpoint as it was read: names mapped, nothing checked against a model yet."""

    path: Path
    config: dict[str, Any]
    """Fields of :class:`CognicaPoEConfig`."""
    weights: dict[str, torch.Tensor]
    step: int
    tokenizer: Path | None
    """``tokenizer.json`` beside the weights."""
    sha256: dict[str, str]
    """Of the files that weights came from, by name."""


def import_checkpoint(
    path: Path,
    out: Path,
    text: str,
    *,
    tokenizer: Path | None = None,
    name: str | None = None,
    step: int | None = None,
    allow_pickle: bool = False,
    measured_bytes: int = MEASURED_BYTES,
    log: Log = lambda line: None,
) -> Path:
    """Write the release folder ``out`` of a foreign checkpoint, measured on ``text``; returns it.

    Args:
        path: folder with config.json and safetensors, folder with model_N.pt and meta_N.json, or one such .pt file.
        out: free, or a release folder to replace.
        text: mix, folder or file to measure on.
        tokenizer: folder or tokenizer.json, where none lies beside the weights.
        name: of the release; that of the folder when omitted.
        step: training step, where the checkpoint does not say or says wrongly.
        allow_pickle: read a .pt file, tensors alone (``weights_only``).
        measured_bytes: most text to measure on.
        log: receives progress lines.

    Raises:
        UserError: no such checkpoint, a pickle without ``allow_pickle``, a configuration that describes no model, names
            or shapes that are not the model's, weights that are not finite, no tokenizer or one of another vocabulary.
    """
    from cognica_poe.analysis.analyzer import analyze
    from cognica_poe.release.export import export_release

    require_replaceable(out, "release")
    require_apart(out, Path(path))
    foreign = read_foreign(Path(path), allow_pickle)
    model = fit(foreign, log)
    called = safe_name(name or foreign.path.resolve().name, "--name")
    number = foreign.step if step is None else step
    dtype = next(iter(foreign.weights.values())).dtype
    with scratch_folder() as scratch:
        words = _tokenizer(tokenizer, foreign, model.config.vocab_size, scratch / "tokenizer")
        build(text, scratch / "data", val_fraction=0.5, val_min_bytes=1, seed=0, log=log)
        model.to(default_device()).eval()  # type: ignore[arg-type]  # transformers hides the signature
        record = analyze(
            model, load_tokenizer(words), scratch / "data", step=number, tokens_seen=0, name=called,
            val_max_bytes=measured_bytes, log=log,
        )  # fmt: skip
        about = {"imported_from": {"name": foreign.path.name, "files": foreign.sha256}}
        return export_release(
            model, words, out, record=record.model_dump(mode="json"), wand_bounds=record.wand_bounds, name=called,
            step=number, about=about, dtype=_DTYPES[dtype], log=log,
        )  # fmt: skip


def read_foreign(path: Path, allow_pickle: bool = False) -> Foreign:
    """Read a checkpoint. Raises UserError as :func:`import_checkpoint`."""
    if path.is_file() and path.suffix == ".pt":
        return _nanochat(path, allow_pickle)
    if not path.is_dir():
        raise UserError(f"no checkpoint {path}: pass a folder with config.json and safetensors, or a model_N.pt")
    if (path / "config.json").is_file():
        return _safetensors(path)
    found = sorted(path.glob("model_*.pt"))
    if not found:
        raise UserError(f"{path} holds neither config.json with safetensors nor nanochat's model_N.pt")
    return _nanochat(found[-1], allow_pickle)


def _safetensors(folder: Path) -> Foreign:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in (".bin", ".pt", ".pth")]
        more = f"; {pickles[0]} is a pickle, which is not read from here" if pickles else ""
        raise UserError(f"{folder} holds no .safetensors file{more}")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            held = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file} is no readable safetensors file ({error})") from error
        if twice := sorted(held.keys() & weights.keys()):
            raise UserError(f"{file} holds {twice[0]}, which another file of {folder} holds too")
        weights |= held
    values = read_json(folder / "config.json", "model configuration")
    if not isinstance(values, dict):
        raise UserError(f"model configuration {folder / 'config.json'} is no JSON object")
    known = {field.name for field in dataclasses.fields(CognicaPoEConfig)} - {"tie_word_embeddings", "use_cache"}
    config = {key: value for key, value in values.items() if key in known}
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if lacking := [key for key in needed if key not in config]:
        raise UserError(f"{folder / 'config.json'} lacks {', '.join(lacking)}: it describes no model of this family")
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    tensors, sums = mapped(weights, str(folder)), {file.name: sha256_file(file) for file in files}
    return Foreign(folder, config, tensors, _step(folder.name), _beside(folder), sums)


def _nanochat(file: Path, allow_pickle: bool) -> Foreign:
    """A checkpoint of nanochat's trainer, or of one that follows it: a state dict and what describes it."""
    if not allow_pickle:
        raise UserError(f"{file} is a pickle, which can run code: add --allow-pickle to read tensors, and nothing else")
    number = re.fullmatch(r"model_(\d+)", file.stem)
    meta = file.with_name(f"meta_{number[1]}.json") if number else file.with_suffix(".json")
    if not meta.is_file():
        raise UserError(f"{file} has no {meta.name} beside it, which describes the model")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of the unpickler, which has no class for what it refuses
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} holds more than tensors, or is damaged: {first[:160]}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{file} holds no state dict of tensors")
    described = read_json(meta, "checkpoint description")
    found = described.get("model_config") if isinstance(described, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{meta} has no model_config: it describes no checkpoint of nanochat")
    tensors = mapped(weights, str(file))
    config = _of_nanochat(found, tensors, str(meta))
    step = int(number[1]) if number else _step(file.stem)
    return Foreign(file, config, tensors, step, _beside(file.parent), {file.name: sha256_file(file)})


def _beside(folder: Path) -> Path | None:
    file = folder / "tokenizer.json"
    return file if file.is_file() else None


def _of_nanochat(found: Mapping[str, Any], weights: Mapping[str, torch.Tensor], where: str) -> dict[str, Any]:
    """Fields of our configuration from nanochat's, and from the shapes where it is silent."""
    names = {
        "vocab_size": "vocab_size", "n_embd": "hidden_size", "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "sequence_len": "max_position_embeddings",
    }  # fmt: skip
    if lacking := [name for name in names if not isinstance(found.get(name), int)]:
        raise UserError(f"{where}: model_config lacks {', '.join(lacking)}")
    config = {own: found[name] for name, own in names.items()}
    layers, mode = config["num_hidden_layers"], found.get("poe_mode") or "none"
    wide = weights.get("transformer.h.0.mlp.c_fc.weight")
    gate = next((value for name, value in weights.items() if name.endswith("attn.ve_gate.weight")), None)
    if gate is not None and gate.shape[-1] == 32:
        raise UserError(f"{where}: gates of 32 channels are those of nanochat before March 2026, not this model's")
    stages = found.get("poe_stage_layers")
    if stages is None and mode != "none":
        every = found.get("poe_every") or layers
        stages = [every] * (layers // every)
    config |= {
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "intermediate_size": wide.shape[0] if wide is not None else 4 * config["hidden_size"],
        "window_pattern": found.get("window_pattern") or "L",
        "poe_mode": mode,
        "poe_alpha": float(found.get("poe_alpha") or 0.0),
        "poe_stage_layers": stages if mode != "none" else [layers],
        "per_stage_head": any(name.startswith("lm_head_stages.") for name in weights),
    }
    if not any(name in weights for name in _NEUTRAL):  # the round of 9 March 2026
        config |= {"qk_scale": 1.15, "short_window": math.ceil(config["max_position_embeddings"] / 3 / 128) * 128}
    return config


def _step(name: str) -> int:
    found = re.search(r"step[-_]?(\d{1,15})$", name)
    return int(found[1]) if found else 0


def mapped(weights: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The tensors under our names: without what wrappers put before them, without tables that follow from the config.

    Raises UserError where two names become one.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        own = name
        while own.startswith(_PREFIXES):
            own = own.partition(".")[2]
        if own.startswith(("wte.", "h.")):
            own = f"transformer.{own}"
        if _TABLES.fullmatch(own):
            continue
        if own in found:
            raise UserError(f"{where}: two tensors are {own}")
        found[own] = tensor
    return found


def fit(foreign: Foreign, log: Log = lambda line: None) -> CognicaPoEForCausalLM:
    """The model of a checkpoint, its weights exactly those. Raises UserError as :func:`import_checkpoint`."""
    config = _config(foreign)
    with torch.device("meta"):
        model = CognicaPoEForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = dict(foreign.weights)
    if weights and not any(name in weights for name in _NEUTRAL):
        log("no smear and no backout in this checkpoint: both are zero, which changes nothing")
        kind = next(iter(weights.values())).dtype
        weights |= {name: torch.zeros(shapes[name], dtype=kind) for name in _NEUTRAL if name in shapes}
    _require_names(foreign.path, shapes.keys(), weights.keys())
    padded = -(-config.vocab_size // 64) * 64
    for name, tensor in weights.items():
        cut = (padded, *shapes[name][1:])
        if tuple(tensor.shape) == cut != shapes[name] and ("embed" in name or "wte" in name or "lm_head" in name):
            weights[name] = tensor = tensor[: config.vocab_size]  # rows of a padded vocabulary, which no token has
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{foreign.path}: {name} has shape {list(tensor.shape)}, the model {list(shapes[name])}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{foreign.path}: {name} is not finite, or no floating-point number")
    kinds = {tensor.dtype for tensor in weights.values()}
    kind = torch.float32 if len(kinds) > 1 else kinds.pop()
    if kind not in _DTYPES:
        raise UserError(f"{foreign.path}: weights are {kind}; pass them as {', '.join(_DTYPES.values())}")
    built = CognicaPoEForCausalLM(config)
    built.to(kind)  # type: ignore[arg-type]  # transformers hides the signature
    built.load_state_dict({name: tensor.to(kind) for name, tensor in weights.items()}, strict=True)
    return built


def _config(foreign: Foreign) -> CognicaPoEConfig:
    for name, bounds in field_ranges(ModelRecipe).items():  # so that no model is built that no machine holds
        value = foreign.config.get(name)
        if problem := bounds.problem(tuple(value) if isinstance(value, list) else value):
            raise UserError(f"{foreign.path}: {name} {problem}")
    try:
        return CognicaPoEConfig(**foreign.config)
    except Exception as error:  # of strict dataclasses, which raise their own
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"{foreign.path}: its configuration describes no model: {last}") from error


def _require_names(path: Path, wanted: Iterable[str], found: Iterable[str]) -> None:
    wanted, found = set(wanted), set(found)
    parts = []
    for word, names in (("missing", wanted - found), ("unexpected", found - wanted)):
        if names:
            listed = ", ".join(sorted(names)[:_LISTED])
            parts.append(f"{len(names)} {word}: {listed}{', ...' if len(names) > _LISTED else ''}")
    if parts:
        raise UserError(f"{path} does not fit the model of its configuration: {'; '.join(parts)}")


def _tokenizer(given: Path | None, foreign: Foreign, vocab_size: int, out: Path) -> Path:
    file = foreign.tokenizer if given is None else given / "tokenizer.json" if given.is_dir() else given
    if file is None or not file.is_file():
        where = f"{foreign.path} has no tokenizer.json beside it" if given is None else f"no tokenizer at {given}"
        remedy = "a folder or a tokenizer.json (a tokenizer.pkl is a pickle, which is not read)"
        raise UserError(f"{where}: pass --tokenizer, {remedy}")
    copy_tokenizer(file, out, {"weights": next(iter(foreign.sha256.values()))})
    ids = load_tokenizer(out).vocab_size
    if ids > vocab_size:
        raise UserError(f"{file} has {ids} ids, the model {vocab_size}: it is not its tokenizer")
    return out
