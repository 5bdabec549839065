"""Forms that a weight matrix takes when decoding: as trained, packed for the processor, 8 or 4 bits per weight.

Decoding reads every weight once per step, so that bytes are time. The quantised forms serve drafting alone: whatever
they propose is verified with the weights as trained.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

INT4_GROUP = 32
"""Weights that share a scale in the 4-bit form."""


class DenseLinear(nn.Module):
    """``x @ weight.T`` with the weight ``[O, I]`` as trained; on a processor in bf16, packed once for its kernels.

    ``F.linear`` packs a bf16 weight again at every call, which takes half of the time of a step. Under
    ``torch.compile`` freezing does the same, so that the plain product stands in the graph; ``compiled`` says that the
    weight itself is wanted for it, which otherwise goes once it is packed.
    """

    def __init__(self, weight: torch.Tensor, compiled: bool = False):
        super().__init__()
        packs = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _multiplies_bfloat16()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 8) if packs else None
        self.weight = kept(weight) if compiled or not packs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., I]`` to ``[..., O]``."""
        if self.weight is not None and (self.packed is None or torch.compiler.is_compiling()):
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Int8Linear(nn.Module):
    """8-bit weights with one scale per output row (symmetric, round to nearest)."""

    def __init__(self, weight: torch.Tensor, compiled: bool = False):
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp_min(1e-8) / 127
        self.weight = kept((weight.float() / scale[:, None]).round().to(torch.int8))
        self.scale = kept(scale.to(weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., I]`` to ``[..., O]``."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            flat = x.reshape(-1, x.shape[-1])
            return torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Int4Linear(nn.Module):
    """4-bit weights, a scale per group of 32 inputs (symmetric around 8, round to nearest).

    Raises:
        ValueError: the inputs are no multiple of 32.
    """

    def __init__(self, weight: torch.Tensor, compiled: bool = False):
        super().__init__()
        rows, columns = weight.shape
        if columns % INT4_GROUP:
            raise ValueError(f"a 4-bit drafter needs widths that are multiples of {INT4_GROUP}, not {columns}")
        groups = weight.float().view(rows, columns // INT4_GROUP, INT4_GROUP)
        scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-8) / 7
        quantised = ((groups / scale).round() + 8).clamp(0, 15).to(torch.int32).view(rows, columns)
        self.native = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and rows % 16 == 0
        if self.native:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantised, 1)
            scales = torch.stack((scale.squeeze(-1), torch.zeros_like(scale.squeeze(-1))), dim=-1).transpose(0, 1)
        else:
            packed = (quantised[:, ::2] | quantised[:, 1::2] << 4).to(torch.uint8)
            scales = scale
        self.weight, self.scale = kept(packed.contiguous()), kept(scales.to(weight.dtype).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., I]`` to ``[..., O]``."""
        if self.native:
            flat = x.reshape(-1, x.shape[-1])
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.weight, INT4_GROUP, self.scale)
            return out.view(*x.shape[:-1], -1)
        return F.linear(x, self.dense(x.dtype))

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights ``[O, I]`` that the nibbles of the portable form stand for."""
        nibbles = torch.stack((self.weight & 15, self.weight >> 4), dim=-1).flatten(1)
        groups = (nibbles.to(dtype) - 8).view(len(nibbles), -1, INT4_GROUP) * self.scale
        return groups.flatten(1)


LINEARS = {"dense": DenseLinear, "int8": Int8Linear, "int4": Int4Linear}
"""Forms by name; all but ``dense`` are for drafting."""


def kept(tensor: torch.Tensor) -> nn.Buffer:
    """A tensor as a buffer of a module, where graphs look for it; no gradient reaches it."""
    return nn.Buffer(tensor.detach(), persistent=False)


def _multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
