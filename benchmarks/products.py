"""``python -m benchmarks.products``: what keeps the products of a small model from streaming, in bf16 on one thread.

The products of a decode step (three projections in one, attention's output, the MLP's two) of as many layers as hold
``--megabytes``, in four ways that take turns: the library's packed product, called one by one; a compiled graph of
Inductor's own products; one where ours is among the choice; and reading the same bytes, the floor. The medians of the
rounds are shown, per product and as bytes per second.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch import nn

from cognica_poe.cli.output import print_table
from cognica_poe.errors import UserError
from cognica_poe.modeling.linears_cognica_poe import DenseLinear
from cognica_poe.modeling.products_cognica_poe import narrow_products

WAYS = ("library", "Inductor's", "ours")
OPTIONS = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}


class Products(nn.Module):
    """The products of a number of layers, one feeding the next."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.width = width
        shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                DenseLinear(torch.randn(shape, generator=generator).bfloat16() / shape[1] ** 0.5, compiled=True)
                for shape in shapes
            )
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[lanes, width]`` to ``[lanes, width]``."""
        for qkv, out, up, down in self.layers:  # type: ignore[misc]  # modules of modules
            x = out(qkv(x)[:, : self.width])
            x = down(up(x))
        return x

    def weights(self) -> list[torch.Tensor]:
        """All of them."""
        return [weight for name, weight in self.named_buffers() if name.endswith(".weight")]


def compiled(module: nn.Module, x: torch.Tensor, ours: bool, folder: Path) -> Callable[[], object]:
    """A call of a package made of ``module``, without the library's products."""
    program = torch.export.export(module, (x,))
    with narrow_products() if ours else contextlib.nullcontext():
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / f"{ours}.pt2"), inductor_configs=OPTIONS
        )
    loaded = torch._inductor.aoti_load_package(package, run_single_threaded=True)
    return lambda: loaded(x)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


@torch.no_grad()
def measure(width: int, lanes: int, megabytes: int, rounds: int, repeats: int) -> list[str]:
    """A row of the table."""
    per_layer = 24 * width * width
    products = Products(width, max(1, round(megabytes * 1e6 / per_layer))).eval()
    weights = products.weights()
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    flat = torch.cat([weight.flatten() for weight in weights]).view(torch.int64)
    x = torch.randn(lanes, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], object]] = {"read": lambda: flat.sum(), "library": lambda: products(x)}
        calls |= {way: compiled(products, x, way == "ours", Path(folder)) for way in WAYS[1:]}
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(seconds(call, repeats))
    middle = {name: statistics.median(times) for name, times in found.items()}
    cells = [f"{1e6 * middle[way] / len(weights):.1f} us, {size / middle[way] / 1e9:.1f}" for way in WAYS]
    return [str(width), str(lanes), f"{size / 1e6:.0f}", *cells, f"{size / middle['read'] / 1e9:.1f}"]


def compare(
    widths: tuple[int, ...] = (128, 256, 512, 2048),
    lanes: tuple[int, ...] = (1, 4),
    megabytes: int = 26,
    rounds: int = 5,
    repeats: int = 20,
) -> None:
    """Print the table.

    Args:
        widths: Widths of the residual stream.
        lanes: Rows of a product.
        megabytes: Weights that a pass reads; at least one layer.
        rounds: Turns of every way.
        repeats: Passes of a turn.
    """
    if not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        raise UserError("our product is for processors with AVX-512 BF16 and without tiles, and this is none")
    torch.set_num_threads(1)
    rows = [measure(width, count, megabytes, rounds, repeats) for width in widths for count in lanes]
    columns = ["width", "lanes", "MB", *(f"{way} (per product, GB/s)" for way in WAYS), "read GB/s"]
    print_table("products of a decode step in bf16, one thread", columns, rows)


if __name__ == "__main__":
    try:
        tyro.cli(compare)
    except UserError as error:
        print(f"benchmarks.products: {error}", file=sys.stderr)
        sys.exit(2)
