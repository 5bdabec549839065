"""Models and prompts to time decoding on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cognica_poe.errors import UserError
from cognica_poe.recipe.named import RECIPES, find_recipe
from cognica_poe.release.loading import load


def find_model(
    name: str, dtype: torch.dtype, device: torch.device, exit_layers: Sequence[int] = ()
) -> tuple[Any, Any | None]:
    """Model and tokenizer of a release folder, or random weights of a recipe's shape and no tokenizer.

    ``exit_layers`` are the exits of the random model.

    Raises:
        UserError: neither a release folder nor a recipe, exits that cannot be or are asked of a release, or a model
            without trained stage heads.
    """
    model: Any
    if exit_layers and name not in RECIPES and not name.endswith(".json"):
        raise UserError(f"bench decode: --exit-layers are for a recipe, {name} has exits of its own or none")
    if Path(name).is_dir() and not (Path(name) / "recipe.json").is_file():
        model, tokenizer = load(name)
    elif name in RECIPES or name.endswith(".json"):
        from cognica_poe.training.build import build_model

        shape = find_recipe(name).model
        shape = dataclasses.replace(shape, poe_exit_layers=tuple(exit_layers)) if exit_layers else shape
        model, tokenizer = build_model(shape), None
        with torch.no_grad():  # zeroed output matrices would make every stage agree
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
    else:
        raise UserError(f"{name} is no release folder and no recipe; recipes are {', '.join(RECIPES)}")
    if model.config.poe_mode == "none":
        raise UserError(f"{name}: poe_mode is none, so that there are no stages to decode with")
    return model.to(device, dtype).eval(), tokenizer


def find_prompts(
    tokenizer: Any | None,
    config: Any,
    text: Path | None,
    count: int,
    length: int,
    batch: int,
    new: int,
    log: Callable[[str], None] = lambda line: None,
) -> list[torch.Tensor]:
    """At most ``count`` prompts of ``length`` tokens, ``batch`` to a tensor ``[batch, length]``.

    Without a tokenizer they are random ids; without a text, the seven probe prompts in rows of equal length.

    Raises:
        UserError: prompt and new tokens exceed the context, or the text has too few long documents.
    """
    if length + new > config.max_position_embeddings:
        raise UserError(
            f"bench decode: {length} prompt tokens and {new} new ones exceed the context of "
            f"{config.max_position_embeddings}; lower --prompt-tokens or --new-tokens"
        )
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        rows = list(torch.randint(0, config.vocab_size, (count * batch, length), generator=generator))
    elif text is None:
        from cognica_poe.analysis.probes import PROBES

        rows = [tokenizer(probe.prompt, return_tensors="pt").input_ids[0] for probe in PROBES][: count * batch]
        if batch > 1:
            raise UserError("bench decode: --batch above 1 needs --text, the probe prompts are of unequal length")
    else:
        rows = _from_documents(tokenizer, text, count * batch, length, log)
    if len(rows) < batch:
        raise UserError(
            f"bench decode: {text} has {len(rows)} documents of {length} tokens; --batch {batch} needs more"
        )
    return [torch.stack(rows[i : i + batch]) for i in range(0, len(rows) - batch + 1, batch)]


def _from_documents(
    tokenizer: Any, text: Path, wanted: int, length: int, log: Callable[[str], None]
) -> list[torch.Tensor]:
    from cognica_poe.data.manifest import read_documents
    from cognica_poe.data.texts import collect_texts

    if (text / "data" / "manifest.json").is_file():  # a run: what it held out
        texts = [d.text for d in read_documents(text / "data", "val")]
    else:
        texts = collect_texts(str(text), log)
    rows: list[torch.Tensor] = []
    for document in texts[:: max(1, len(texts) // (4 * wanted))]:  # from all over the text
        ids = tokenizer(document[: 16 * length], return_tensors="pt").input_ids[0]
        if len(ids) >= length and len(rows) < wanted:
            rows.append(ids[:length])
    return rows
