"""Loading a release: a folder, or a revision of ``org/name`` in a Hub cache folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cognica_poe.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM


def load(
    checkpoint: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> tuple[CognicaPoEForCausalLM, PreTrainedTokenizerBase]:
    """Model in evaluation mode, in the dtype of its weights, and tokenizer. No code of the release is run.

    Args:
        checkpoint: release folder, or ``org/name`` with ``cache_dir``.
        revision: such as ``step-300``; ``main`` when omitted. Within a Hub cache folder only.
        cache_dir: Hub cache folder, such as ``publish --to file:FOLDER`` fills.
        device: where the model lives; this machine's accelerator when omitted, the processor where there is none.

    Raises:
        UserError: the folder or revision is missing or damaged, or a folder is given with a revision.
    """
    from cognica_poe.release.export import load_release
    from cognica_poe.training.precision import default_device

    model, tokenizer = load_release(_folder_of(checkpoint, revision, cache_dir))
    model.to(default_device() if device is None else device)  # type: ignore[arg-type]  # transformers hides the signature
    return model, tokenizer


def _folder_of(
    checkpoint: str | os.PathLike[str], revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> Path:
    from cognica_poe.release.publish.hub_folder import resolve_revision

    if Path(checkpoint).is_dir():
        if revision is not None:
            raise UserError(f"{checkpoint} is a folder, which has no revision {revision}: pass the folder of that step")
        if cache_dir is not None:
            raise UserError(f"{checkpoint} is a folder: nothing is looked for in the Hub cache folder {cache_dir}")
        return Path(checkpoint)
    if cache_dir is None:
        raise UserError(
            f"no release folder {checkpoint}: pass the path of a folder that holds config.json and model.safetensors, "
            "or org/name with --cache-dir"
        )
    return resolve_revision(Path(cache_dir), os.fspath(checkpoint), revision or "main")
