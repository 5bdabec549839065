"""The weights that decoding takes from a model: whether they can be taken, and whether they are still the same.

An engine reads matrices, not modules: an adapter beside a matrix, a hook or a quantised layer would be passed over
without a word, so that such a model is refused by the name of the module. What the engine copied is compared with the
model at every call by a digest of the bits, since a weight can change without torch taking note (``.data``, numpy).
"""

from __future__ import annotations

import functools
import re
import zlib

import torch
from torch import nn

from .blocks_cognica_poe import MLP, Attention, Block, Trunk
from .heads_cognica_poe import LowRankHead

PLAIN = (nn.Linear, nn.Embedding, nn.ModuleDict, nn.ModuleList, Trunk, Block, Attention, MLP, LowRankHead)
"""Types of the modules whose results the engine computes from their weights; subclasses compute something else."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def plain_weights(model) -> dict[str, torch.Tensor]:
    """All weights that decoding takes, by name.

    Raises:
        ValueError: a module is none of the model's own (an unmerged adapter, a quantised or offloaded layer), has a
            hook or a bias, or its weight is no plain matrix; weights are on several devices or of several dtypes.
    """
    weights = {name: getattr(model, name) for name in ("resid_lambdas", "x0_lambdas", "smear_lambda")}
    for root in ("lm_head", "lm_head_stages", "lm_head_exits", "transformer", "value_embeds", "smear_gate"):
        for name, module in getattr(model, root).named_modules(prefix=root):
            _refuse(name, _module_fault(module))
            if isinstance(module, nn.Linear | nn.Embedding):
                weights[f"{name}.weight"] = module.weight
    first = model.lm_head.weight
    for name, weight in weights.items():
        _refuse(name.removesuffix(".weight"), _weight_fault(weight))
        same = (weight.dtype, weight.device) == (first.dtype, first.device)
        _refuse(name, None if same else f"is {_kind(weight)}, lm_head.weight {_kind(first)}")
    return weights


def segment_of(name: str, config) -> int:
    """The first segment of layers that needs a weight of :func:`plain_weights`, be it for the head behind it."""
    found = re.match(r"(transformer\.h|value_embeds|lm_head_stages|lm_head_exits)\.(\d+)\.", name)
    if found is None:
        return 0
    number = int(found[2])
    if found[1] == "lm_head_stages":
        return config.stage_segments[number]
    cuts = config.poe_cuts
    if found[1] == "lm_head_exits":
        return cuts.index(config.poe_exit_layers[number])
    return next(segment for segment, end in enumerate(cuts) if number < end)


def identity(weights: dict[str, torch.Tensor]) -> list[tuple]:
    """What tells without a look at the values that weights were replaced, moved, converted or trained further."""
    return [
        (name, w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, w.device) for name, w in weights.items()
    ]


@torch.no_grad()
def digest(weight: torch.Tensor) -> torch.Tensor:
    """Digest of a weight's bits, int64: on a processor their CRC-32, elsewhere :func:`grid_digest`."""
    if not weight.is_cpu:
        return grid_digest(weight)
    return torch.tensor([zlib.crc32(weight.detach().contiguous().flatten().view(torch.uint8).numpy().data)])


def grid_digest(weight: torch.Tensor) -> torch.Tensor:
    """Digest int64, one number per row, of sums that any device takes.

    A row's bits, as 32-bit integers in a grid, are summed exactly along its lines and columns, and these with fixed
    random weights modulo 2^64: unseen are changes that cancel along all lines and columns, others by a chance of 2^-27.
    """
    lanes = _integers(weight)
    count = lanes.shape[1]
    lines = next(n for n in range(max(int(count**0.5), 1), 0, -1) if count % n == 0)
    factors = _factors(lines + count // lines, weight.device)
    parts = []
    for part in lanes.split(max(2**24 // count, 1)):
        grid = part.to(torch.int64).view(len(part), lines, -1)
        sums = torch.cat((grid.sum(dim=2), grid.sum(dim=1)), dim=1)
        parts.append((sums * factors).sum(dim=1))
    return torch.cat(parts)


def _module_fault(module: nn.Module) -> str | None:
    """Why a module's results are not those of its weights alone."""
    if type(module) not in PLAIN:
        return f"is a {type(module).__name__}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if "forward" in vars(module):
        return "has a forward of its own (offloaded?)"
    if isinstance(module, nn.Linear) and module.bias is not None:
        return "has a bias"
    if isinstance(module, nn.Linear | nn.Embedding) and "weight" not in module._parameters:
        return "computes its weight"
    return None


def _weight_fault(weight: torch.Tensor) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"holds a {type(weight).__name__} as weight"
    if weight.is_meta:
        return "has its weight on the meta device"
    if weight.dtype not in FLOATS or weight.layout != torch.strided:
        return f"has a {weight.layout} weight of {weight.dtype}"
    return None


def _kind(weight: torch.Tensor) -> str:
    return f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"


def _refuse(name: str, fault: str | None) -> None:
    if fault is not None:
        raise ValueError(
            f"{name} {fault}: the decoding modes need the model's own plain weights; merge an adapter "
            "(merge_and_unload()) or load the model whole in one dtype on one device, or leave out poe_mode, for "
            "generate() itself works"
        )


def _integers(weight: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers ``[rows, n]``, of 32 bits where rows and storage allow, else of 16."""
    weight = weight.detach().contiguous()
    weight = weight[None] if weight.ndim < 2 else weight.flatten(1)
    bits = (weight.shape[1] * weight.element_size(), weight.storage_offset() * weight.element_size())
    return weight.view(torch.int16 if any(count % 4 for count in bits) else torch.int32)


@functools.cache
def _factors(count: int, device: torch.device) -> torch.Tensor:
    """Fixed odd random numbers, int64."""
    generator = torch.Generator().manual_seed(count)
    return (torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) | 1).to(device)
