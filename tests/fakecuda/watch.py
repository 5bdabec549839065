"""What the host asks of the device: waits, copies and products, counted while code runs on fake tensors.

A wait is what stops the host until the device has caught up: a value read (``item``, ``tolist``, ``bool``, ``numpy``),
a shape that depends on values (``nonzero``, a bool index), a copy to the host, a copy to the device out of pageable
memory. Values that the host reads are stand-ins: 1, and 1.0, and True unless ``bools`` says otherwise.
"""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cognica_poe.modeling import weights_cognica_poe
from tests.fakecuda import device, files

aten = torch.ops.aten
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "embedding", "_int_mm", "mkldnn_rnn_layer", "linear"}
SHAPED_BY_VALUES = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "equal", "is_nonzero"}
COPIES = {"_to_copy", "copy_", "copy"}


class Watch(TorchDispatchMode):
    """Counts by kind: ``read``, ``shape``, ``to host``, ``to device`` (pageable), ``to device, pinned``, ``wait``.

    ``products`` counts products by device type; ``bools`` gives the stand-ins of truth values, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[str] = collections.Counter()
        self.products: collections.Counter[str] = collections.Counter()
        self.answers: Callable[[torch.Tensor], Any] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name.startswith("_fused_"):
            require_one_device(name, tensors)
        if name in PRODUCTS:
            self.products[tensors[0].device.type] += 1
        by_bool = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if (name in SHAPED_BY_VALUES or by_bool) and tensors[0].is_cuda:
            self.note("shape")
        out = func(*args, **kwargs)
        if name in COPIES:
            self._copied(name, args, kwargs, out)
        return out

    def _copied(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        source = args[0] if name == "_to_copy" else args[1]
        passing = kwargs.get("non_blocking", args[2] if name != "_to_copy" and len(args) > 2 else False)
        if source.is_cuda and out.device.type == "cpu":
            self.note("to host, in passing" if passing else "to host")
        elif source.device.type == "cpu" and out.is_cuda:
            pinned = getattr(source, "pinned", False) and passing
            self.note("to device, pinned" if pinned else "to device")

    def note(self, kind: str) -> None:
        """Count one and remember where in the package it came from."""
        self.counts[kind] += 1
        frames = (f for f in reversed(traceback.extract_stack()) if "/cognica_poe/" in f.filename)
        frame = next(frames, None)
        self.places[f"{kind}: {frame.filename.rpartition('/')[2]} {frame.name}" if frame else f"{kind}: torch"] += 1

    def read(self, tensor: torch.Tensor) -> Any:
        """Stand-ins for the values of a tensor, as a numpy array."""
        if tensor.is_cuda:
            self.note("read")
        if self.answers is not None and (answer := self.answers(tensor)) is not None:
            return np.asarray(answer).reshape(tuple(tensor.shape))
        dtype = {torch.bfloat16: torch.float32}.get(tensor.dtype, tensor.dtype)
        return np.ones(tuple(tensor.shape), dtype=str(dtype).removeprefix("torch."))


def require_one_device(name: str, tensors: list[torch.Tensor]) -> None:
    """What fused optimisers take for granted and fake tensors do not check: every pointer is one of the same device.

    A step count on the host would be an illegal access of the kernel.
    """
    found = {tensor.device.type for tensor in tensors if tensor.numel()}
    if len(found) > 1:
        raise RuntimeError(f"{name} over tensors on {' and '.join(sorted(found))}: the kernel reads them on one device")


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Fake tensors within, watched."""
    watch = Watch()
    with contextlib.ExitStack() as stack:
        _stand_in(stack, watch)
        files.stand_in(stack)
        stack.enter_context(device.fake_mode())
        stack.enter_context(watch)
        device.WAITS.clear()
        yield watch


def _stand_in(stack: contextlib.ExitStack, watch: Watch) -> None:
    """Give the methods that read values their stand-ins."""
    real_fault = weights_cognica_poe._weight_fault
    before = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "__array__")}

    def tolist(tensor: torch.Tensor) -> Any:
        return watch.read(tensor).tolist() if isinstance(tensor, FakeTensor) else before["tolist"](tensor)

    def numpy(tensor: torch.Tensor, **options: Any) -> Any:
        return watch.read(tensor) if isinstance(tensor, FakeTensor) else before["numpy"](tensor, **options)

    def array(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        return watch.read(tensor) if isinstance(tensor, FakeTensor) else before["__array__"](tensor, *args, **options)

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone()
        pinned.pinned = True
        return pinned

    def weight_fault(weight: torch.Tensor) -> str | None:  # a fake parameter is of another type than a real one
        return None if isinstance(weight, FakeTensor) and weight._is_param else real_fault(weight)

    def scalar(mode: Any, func: Any, tensor: torch.Tensor) -> Any:
        return watch.read(tensor).item()

    def equal(mode: Any, func: Any, one: torch.Tensor, other: torch.Tensor) -> bool:
        return one.shape == other.shape and one.dtype == other.dtype

    def nonzero(mode: Any, func: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros((tensor.numel(), tensor.ndim), dtype=torch.int64)

    methods = {"tolist": tolist, "numpy": numpy, "pin_memory": pin_memory, "__array__": array}
    replacements = [(torch.Tensor, name, method) for name, method in methods.items()]
    replacements += [(FakeTensor, "tolist", tolist), (FakeTensor, "data_ptr", lambda t: t.untyped_storage()._cdata)]
    replacements.append((weights_cognica_poe, "_weight_fault", weight_fault))
    for owner, name, method in replacements:
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, method)
    table = fake_impls.op_implementations_dict
    answers = {aten._local_scalar_dense: scalar, aten.equal: equal, aten.nonzero: nonzero}
    for operation, answer in ((packet.default, answer) for packet, answer in answers.items()):
        earlier = table.get(operation)
        table[operation] = answer
        stack.callback(table.__setitem__ if earlier else lambda key, _: table.pop(key), operation, earlier)
