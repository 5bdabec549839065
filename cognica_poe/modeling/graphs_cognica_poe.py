"""Decode functions compiled by torch, one graph per function and shape.

On a processor a graph is a package of AOTInductor: machine code with the weights in it, kept on disk beside torch's
own compiled kernels (``TORCHINDUCTOR_CACHE_DIR``), so that the next process loads in a moment what this one compiled.
Its name is a digest of all that its result depends on. On an accelerator it is a graph of ``torch.compile`` that is
launched as one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import types
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from .products_cognica_poe import narrow_products

ON_PROCESSOR = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
"""Inductor's options: its own products, fused with what follows them, where they measure faster than the library's.

A call of the library costs some 20 us, several times what the narrow products of a small model take.
"""

ON_ACCELERATOR = {"triton.cudagraphs": True}
"""Inductor's options: one launch per graph."""


class Graphs:
    """The compiled functions of one engine.

    Args:
        device: where they run.
        kept: graphs to hold at most, for on a processor each holds its weights; the one unused for longest goes, and
            comes back from disk.

    Attributes:
        seconds: time spent on compiling and loading so far.
        compiled, loaded: graphs that were made here, and that a cache on disk held.
    """

    def __init__(self, device: torch.device, kept: int = 64):
        self.device, self.seconds, self.compiled, self.loaded = device, 0.0, 0, 0
        self.kept = kept
        self._graphs: dict = {}

    def call(self, key: Hashable, module: nn.Module, fixed: tuple, *arguments):
        """``module(*fixed, *arguments)`` through its graph; ``key`` tells functions and shapes apart.

        Args:
            key: stands for the function, ``fixed`` and all shapes: nothing else is compared at a call.
            module: holds its weights as parameters or buffers.
            fixed: leading arguments that are part of the graph.
            arguments: tensors, lists of tensors or None. The graph may write to them.
        """
        if key not in self._graphs:
            began = time.perf_counter()
            make = self._package if self.device.type == "cpu" else self._launched
            graph = make(_Fixed(module, fixed), arguments)
            self.seconds += time.perf_counter() - began
            if len(self._graphs) >= self.kept:
                del self._graphs[next(iter(self._graphs))]
        else:
            graph = self._graphs.pop(key)
        self._graphs[key] = graph  # the last in order of use
        return graph(arguments)

    def _launched(self, module: _Fixed, arguments: tuple):
        # Torch keeps its graphs per code object and takes the first whose guards hold. Here no guard is kept, so that a
        # code object that two functions or shapes share would answer both with the graph of the first.
        forward = cast(types.FunctionType, _Fixed.forward)
        own = types.FunctionType(forward.__code__.replace(co_name=f"graph_{len(self._graphs)}"), forward.__globals__)
        options: dict[str, str | int | bool | Callable] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        graph = torch.compile(
            types.MethodType(own, module), dynamic=False, fullgraph=True, options=options | ON_ACCELERATOR
        )

        def call(arguments):
            out = graph(*arguments)
            # A launched graph writes its next answer over this one, which a mode may still hold.
            return out.clone() if isinstance(out, torch.Tensor) else out

        return call

    def _package(self, module: _Fixed, arguments: tuple):
        path, loader = cache_folder() / f"{_digest(module, arguments)}.pt2", None
        if path.is_file():
            with contextlib.suppress(RuntimeError):  # damaged: it is made again
                loader = _load(path)
                self.loaded += 1
        if loader is None:
            _compile(module, arguments, path)
            loader = _load(path)
            self.compiled += 1

        def call(arguments):
            out = loader.boxed_run(_tensors(arguments))
            return out[0] if out else None

        return call


class _Fixed(nn.Module):
    """A module with its leading arguments fixed."""

    def __init__(self, module: nn.Module, fixed: tuple):
        super().__init__()
        self.module, self.fixed = module, fixed

    def forward(self, *arguments):
        out = self.module(*self.fixed, *arguments)
        return () if out is None else out


def has_compiler() -> bool:
    """Whether there is a C++ compiler, without which a processor's graphs cannot be made."""
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


def cache_folder() -> Path:
    """Where packages are kept: ``cognica_poe`` in torch's folder of compiled kernels."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "cognica_poe"


def _compile(module: nn.Module, arguments: tuple, path: Path) -> None:
    """Write the package of ``module(*arguments)`` to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Inductor reports every product that it times to stderr.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, contextlib.redirect_stderr(io.StringIO()):
        program = torch.export.export(module, arguments)
        made = f"{folder}/graph.pt2"
        with narrow_products():
            torch._inductor.aoti_compile_and_package(program, package_path=made, inductor_configs=dict(ON_PROCESSOR))
        os.replace(made, path)


def _load(path: Path):
    """The loader of a package. Raises RuntimeError for one that cannot be read."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # asks the kernel for the tile registers, once per process
    return torch._inductor.aoti_load_package(str(path), run_single_threaded=True).loader


def _tensors(arguments: Iterable) -> list[torch.Tensor]:
    """All tensors in order."""
    found: list[torch.Tensor] = []
    for argument in arguments:
        found += argument if isinstance(argument, list | tuple) else [] if argument is None else [argument]
    return found


def _digest(module: _Fixed, arguments: tuple) -> str:
    """Digest of code, weights, shapes, torch and processor: what the machine code of a graph depends on."""
    sha = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        sha.update(source.read_bytes())
    shapes = [None if a is None else [[*t.shape, str(t.dtype)] for t in _tensors([a])] for a in arguments]
    facts = [torch.__version__, dict(torch.cpu.get_capabilities()), torch.get_num_threads(), ON_PROCESSOR, shapes]
    config = cast(PreTrainedConfig, module.module.config)
    facts += [repr(module.fixed), type(module.module).__name__, config.to_json_string()]
    sha.update(json.dumps(facts, default=str).encode())
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, tensor in sorted(weights.items()):
        sha.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:32]
