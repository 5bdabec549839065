"""Weights that a run starts from: those of a release or of another run's checkpoint, kept with their tokenizer.

``RUN/initial`` holds ``model.safetensors`` (fp32), ``tokenizer.json`` and ``origin.json``, so that the run needs its
source no more. Optimiser state and schedule begin anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.files import (
    Manifest,
    atomic_folder,
    read_json,
    require_space,
    verify_manifest,
    write_bytes,
    write_json,
)
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.recipe.fields import ModelRecipe, Recipe
from cognica_poe.recipe.stored import fixed_sha256, load_run_recipe
from cognica_poe.seals import require_made_from, require_sha256
from cognica_poe.training.checkpoint import Pieces

FOLDER = "initial"


@dataclass(frozen=True)
class Origin:
    """Where the weights of a run come from."""

    name: str
    """Of the release, or of the recipe that the checkpoint was trained by."""
    step: int
    sha256: str
    """Of the file with the weights; of the manifest's lines about them where a checkpoint has one file per rank."""


@dataclass(frozen=True)
class Source:
    """A release or checkpoint folder that was verified."""

    origin: Origin
    tokenizer: Path
    weights: Mapping[str, torch.Tensor]

    def keep(self, run: Path) -> None:
        """Write ``RUN/initial``."""
        out = Path(run) / FOLDER
        size = sum(tensor.numel() * 4 for tensor in self.weights.values())
        require_space(out, size + 16_000_000)
        with atomic_folder(out, "checkpoint") as folder:
            tensors = {name: tensor.float().contiguous() for name, tensor in self.weights.items()}
            write_bytes(folder / "model.safetensors", save(tensors))
            write_bytes(folder / "tokenizer.json", (self.tokenizer / "tokenizer.json").read_bytes())
            write_json(folder / "origin.json", dataclasses.asdict(self.origin))


def open_source(path: Path, recipe: Recipe) -> Source:
    """A release folder, or a checkpoint folder ``RUN/checkpoints/step-N``, that ``recipe`` can go on from.

    Raises UserError when it is neither, is damaged, holds what is not finite, or when shape or vocabulary are not those
    of the recipe, naming the first field or tensor that differs.
    """
    path = Path(path)
    if (path / "release.json").is_file():
        verify_manifest(path)
        about = read_json(path / "release.json", "release description")
        config, tokenizer, name = read_json(path / "config.json", "model configuration"), path, about["name"]
    elif (path / "state.json").is_file() and (path.parent.parent / "recipe.json").is_file():
        made_from, run = verify_manifest(path).made_from, path.resolve().parent.parent
        about, trained = read_json(path / "state.json", "checkpoint state"), load_run_recipe(run / "recipe.json")
        config, tokenizer, name = dataclasses.asdict(trained.model), run / "tokenizer", trained.name
        parts = {"recipe": fixed_sha256(trained), "tokenizer": load_tokenizer(tokenizer).sha256}
        require_made_from(made_from, parts, path, "restore what was changed in its run, or use another step")
    else:
        raise UserError(
            f"--init-from {path} is neither a release folder nor a checkpoint folder RUN/checkpoints/step-N"
        )
    _require_shape(path, config, recipe)
    ids = load_tokenizer(tokenizer).vocab_size
    if ids != recipe.model.vocab_size:
        raise UserError(f"--init-from {path}: its tokenizer has {ids} ids, this recipe {recipe.model.vocab_size}")
    weights = Pieces(path, "model")
    _require_tensors(path, weights, recipe)
    return Source(Origin(str(name), int(about["step"]), _weights_sha256(path)), tokenizer, weights)


def _require_shape(path: Path, given: dict[str, Any], recipe: Recipe) -> None:
    there, here = CognicaPoEConfig(**given), CognicaPoEConfig(**dataclasses.asdict(recipe.model))
    for field in dataclasses.fields(ModelRecipe):
        found, wanted = getattr(there, field.name), getattr(here, field.name)
        if found != wanted:
            option = f"model.{field.name.replace('_', '-')}"
            raise UserError(f"--init-from {path}: {option} is {found} there and {wanted} in this recipe")


def _require_tensors(path: Path, weights: Mapping[str, torch.Tensor], recipe: Recipe) -> None:
    with torch.device("meta"):
        model = CognicaPoEForCausalLM(CognicaPoEConfig(**dataclasses.asdict(recipe.model)))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in weights or name not in shapes:
            raise UserError(f"--init-from {path}: {name} is {'not in' if name in shapes else 'only in'} its weights")
        tensor = weights[name]
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"--init-from {path}: {name} has shape {list(tensor.shape)}, not {list(shapes[name])}")
        if not tensor.isfinite().all():
            raise UserError(f"--init-from {path}: {name} is not finite; use another step")


def _weights_sha256(path: Path) -> str:
    digests = {name: digest for name, digest in Manifest.read(path).digests.items() if name.startswith("model")}
    weights = {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}
    if len(weights) == 1:
        return next(iter(weights.values()))
    lines = "".join(f"{weights[name]}  {name}\n" for name in sorted(weights))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_origin(run: Path) -> Origin | None:
    """Where the weights of ``run`` come from; None when it started from none. Raises UserError for a damaged file."""
    file = Path(run) / FOLDER / "origin.json"
    if not file.is_file():
        return None
    remedy = "restore it, or start again in another --out"
    listed = Manifest.read(file.parent, remedy).digests
    require_sha256(file, listed.get(file.name, "of no listed file"), "origin of the weights", remedy)
    try:
        return Origin(**read_json(file, "origin of the weights"))
    except TypeError as error:
        raise UserError(f"{file} is corrupt; restore it, or start again in another --out") from error


def initial_weights(run: Path) -> Mapping[str, torch.Tensor] | None:
    """The weights that ``run`` starts from, fp32, by name; None for a fresh one. Raises UserError for damaged ones."""
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        return None
    verify_manifest(folder)
    return Pieces(folder, "model")
