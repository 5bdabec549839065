"""Files read and written beside fake tensors: what is read is real until it is moved, what is written is zeros.

safetensors reads and writes memory, which fake tensors do not have. Sizes, names, digests and folders stay true.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.training import checkpoint


class File:
    """``safe_open`` beside the modes that make tensors fake."""

    def __init__(self, *args: Any, **options: Any):
        self._opened = safetensors.safe_open(*args, **options)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self._opened.keys())

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor on the processor, with its values."""
        with _disable_current_modes():
            return self._opened.get_tensor(name)


class Thread:
    """Work that would go on beside the training, done at once: one fake mode serves one thread."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...] = (), name: str = ""):
        self.target, self.args = target, args

    def start(self) -> None:
        """Do it."""
        self.target(*self.args)

    def join(self) -> None:
        """It has been done."""


def real(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros in the place of fake tensors. Raises RuntimeError for one that was not brought to the host."""
    if away := [name for name, tensor in tensors.items() if tensor.device.type != "cpu"]:
        raise RuntimeError(f"{away[0]} is to be written and lies on {tensors[away[0]].device}")
    return {
        name: torch.zeros(tuple(t.shape), dtype=t.dtype) if isinstance(t, FakeTensor) else t
        for name, t in tensors.items()
    }


def stand_in(stack: contextlib.ExitStack) -> None:
    """Read and write through these for as long as ``stack`` is open."""
    from_pretrained, save_pretrained = CognicaPoEForCausalLM.from_pretrained, CognicaPoEForCausalLM.save_pretrained

    def load(cls: type, *args: Any, **options: Any) -> Any:
        with _disable_current_modes():
            return from_pretrained(*args, **options)

    def save(tensors: Mapping[str, torch.Tensor]) -> bytes:
        with _disable_current_modes():
            return safetensors.torch.save(real(tensors))

    def save_model(model: Any, folder: Any, *, state_dict: Mapping[str, torch.Tensor], **options: Any) -> None:
        with _disable_current_modes():
            save_pretrained(model, folder, state_dict=real(state_dict), **options)

    replacements = (
        (checkpoint, "threading", SimpleNamespace(Thread=Thread)),
        (checkpoint, "safe_open", File),
        (checkpoint, "save", save),
        (CognicaPoEForCausalLM, "from_pretrained", classmethod(load)),
        (CognicaPoEForCausalLM, "save_pretrained", save_model),
    )
    for owner, name, replacement in replacements:
        before = vars(owner).get(name)
        setattr(owner, name, replacement)
        stack.callback(*((delattr, owner, name) if before is None else (setattr, owner, name, before)))
