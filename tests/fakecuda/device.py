"""A CUDA device without a GPU: torch's fake tensors, which have shape, dtype and device and no values.

A process that has loaded the guard before it imports torch, and called ``install``, believes in a device ``cuda:0``;
that cannot be undone, so that it belongs into a process of its own. Whoever enters ``fake_mode`` then runs forward,
autocast, backward, hooks and fused optimisers "there": an operation on tensors of two devices fails as it would on a
GPU. What does not happen: no kernel runs, no value exists, inductor compiles nothing, memory is not counted.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CUDA = torch.device("cuda", 0)
MEMORY = 80 * 2**30
WAITS: list[str] = []
"""Every wait of the host for the device that is no operation on a tensor."""


def install() -> None:
    """Let this process, which has loaded the guard, find one CUDA device: an H100 by its facts."""
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.is_initialized = lambda: True
    cuda._lazy_init = lambda: None
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.set_device = lambda device: None
    cuda.empty_cache = lambda: None
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(total_memory=MEMORY, name="fake", major=9, minor=0)
    cuda.synchronize = lambda device=None: WAITS.append("synchronize")
    cuda.Event = Event
    cuda.amp.common.amp_definitely_not_available = lambda: False
    FakeTensorMode.avoid_device_init = property(lambda mode: True)
    F.scaled_dot_product_attention = attention
    ALL_ATTENTION_FUNCTIONS._global_mapping["flex_attention"] = block_attention
    torch.nn.Module._apply = apply_to_tensors


class Event:
    """An event of CUDA: waiting for it is noted."""

    def __init__(self, enable_timing: bool = False):
        pass

    def record(self, stream: object = None) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Note the wait."""
        WAITS.append("event")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds, made up."""
        return 1.0


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """``F.scaled_dot_product_attention`` by products: torch's own asks the device which of its kernels to take."""
    if torch.is_autocast_enabled(query.device.type):
        wanted = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(wanted) for t in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention over {query.dtype}, {key.dtype} and {value.dtype}: CUDA takes one dtype")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"attention in {query.dtype} with a mask in {attn_mask.dtype}: CUDA takes one dtype")
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1) @ value


def block_attention(module, query, key, value, mask, scaling=None, **options):
    """flex_attention as transformers calls it, by products: its kernel is compiled. The block mask is made as ever."""
    wanted = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    for tensor in (query, key, value):
        if tensor.dtype != wanted:
            raise RuntimeError(f"flex_attention over {tensor.dtype} where products are made in {wanted}")
    if not (mask.kv_indices.is_cuda and mask.kv_num_blocks.is_cuda):
        raise RuntimeError("flex_attention with a block mask on the host")
    out = attention(query, key, value, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2), None


def apply_to_tensors(module: torch.nn.Module, fn, recurse: bool = True) -> torch.nn.Module:
    """``Module._apply``, behind ``to`` and its like: torch's own cannot move fake parameters."""
    for child in module.children() if recurse else ():
        apply_to_tensors(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        moved = fn(parameter.detach())
        if (moved.device, moved.dtype) != (parameter.device, parameter.dtype):
            module._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else fn(buffer)
    return module


def fake_mode() -> FakeTensorMode:
    """Tensors made within are fake; those that come from files are taken for what their shapes say."""
    return FakeTensorMode(allow_non_fake_inputs=True)
