"""The device guard, compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

SOURCE = Path(__file__).with_name("guard.cpp")


def guard(folder: Path) -> Path:
    """Compile ``guard.cpp`` into ``folder``, in a few seconds. Raises CalledProcessError."""
    library, torch_lib = folder / "guard.so", os.path.join(os.path.dirname(torch.__file__), "lib")
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
    options = ["-O0", "-w", "-shared", "-fPIC", "-std=c++20", *(f"-I{path}" for path in include_paths())]
    libraries = [f"-L{torch_lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_lib}"]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(library), *libraries], check=True)
    return library
