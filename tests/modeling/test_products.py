"""The product for few lanes: its sums, that Inductor takes it, and that a lane's result is the same on every lane."""

import zipfile

import pytest
import torch
from torch import nn

from cognica_poe.modeling.products_cognica_poe import narrow_products

HAS_INSTRUCTION = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


class Chain(nn.Module):
    """Two products, one with columns that no block of it divides."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = ((320, 96), (100, 320))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).bfloat16(), requires_grad=False) for shape in shapes
        )

    def forward(self, x):
        for weight in self.weights:
            x = nn.functional.linear(x, weight) / weight.shape[1] ** 0.5
        return x


@pytest.mark.skipif(not HAS_INSTRUCTION, reason="a processor with AVX-512 BF16 and without tiles")
@pytest.mark.parametrize("lanes", [4, *(pytest.param(lanes, marks=pytest.mark.slow) for lanes in (1, 3, 7))])
def test_sums_are_those_of_the_library(lanes, tmp_path):
    chain = Chain().eval()
    x = torch.randn(lanes, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    options = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}
    with torch.no_grad(), narrow_products():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(chain, (x,)), package_path=str(tmp_path / "chain.pt2"), inductor_configs=options
        )
    archive = zipfile.ZipFile(package)
    code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))
    assert "_mm512_dpbf16_ps" in code
    run = torch._inductor.aoti_load_package(package, run_single_threaded=True)
    found, expected = run(x), chain(x)
    exact = chain.double()(x.double())
    assert (found - exact).abs().max() <= 1.5 * (expected - exact).abs().max()
    for lane in range(lanes):  # the same numbers on other lanes
        turned = run(x.roll(lane, dims=0))
        assert torch.equal(turned, found.roll(lane, dims=0))


def test_inductor_is_left_as_it_was():
    from torch._inductor import select_algorithm  # noqa: F401  before the next: they import each other
    from torch._inductor.codegen import cpp_micro_gemm

    before = dict(cpp_micro_gemm.micro_gemm_configs)
    with pytest.raises(KeyError), narrow_products():
        assert (len(cpp_micro_gemm.micro_gemm_configs) > len(before)) == HAS_INSTRUCTION
        raise KeyError
    assert cpp_micro_gemm.micro_gemm_configs == before
