"""A product for few lanes in bf16, for Inductor to choose on processors with AVX-512 BF16 and no tiles.

Inductor has two for bf16: one for tiles, and one that widens every weight to fp32 first, whose arithmetic sets the pace
at four lanes. This one feeds pairs of bf16 to ``vdpbf16ps`` from the layout that tiles use, ``[K / 2, N, 2]``: 64 bytes
of weights cost one instruction per lane, which keeps pace with memory (``python -m benchmarks.products``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

LANES, COLUMNS = 4, 64
"""A block of the product: 16 sums of 16 columns, which together with what they read fill the 32 registers."""

KERNEL = r"""
template <int64_t M, int64_t N, bool accum>
inline void {{kernel_name}}_kernel(
    const {{input_t}}* {{restrict_keyword}} A,
    const {{input2_t}}* {{restrict_keyword}} B,
    {{output_t}}* {{restrict_keyword}} C,
    int64_t K,
    int64_t lda,
    int64_t ldb,
    int64_t ldc
) {
    constexpr int COLS = N / 16;
    __m512 sums[M * COLS];
    __m512bh weights[COLS];
    c10::ForcedUnroll<M * COLS>{}([&](auto i) { sums[i] = _mm512_setzero_ps(); });
    for (int64_t k = 0; k < K; k += 2) {
        c10::ForcedUnroll<COLS>{}([&](auto col) {
            weights[col] = (__m512bh)_mm512_loadu_si512((const void*)(B + k * ldb + col * 32));
        });
        c10::ForcedUnroll<M>{}([&](auto row) {
            int32_t pair;
            std::memcpy(&pair, A + row * lda + k, sizeof pair);
            const auto lane = (__m512bh)_mm512_set1_epi32(pair);
            c10::ForcedUnroll<COLS>{}([&](auto col) {
                sums[row * COLS + col] = _mm512_dpbf16_ps(sums[row * COLS + col], lane, weights[col]);
            });
        });
    }
    c10::ForcedUnroll<M * COLS>{}([&](auto i) {
        float* out = C + (i / COLS) * ldc + (i % COLS) * 16;
        if constexpr (accum) sums[i] = _mm512_add_ps(sums[i], _mm512_loadu_ps(out));
        _mm512_storeu_ps(out, sums[i]);
    });
}
"""

ENTRY = r"""
{{declare_kernel}} {
    {{kernel.assert_function}}(N % {{block_n}} == 0, "N dimension must be multiple of {{block_n}}");
    {{kernel.assert_function}}(K % 2 == 0, "K dimension must be even");
    for (int64_t m = 0; m < M; m += {{block_m}}) {
        for (int64_t n = 0; n < N; n += {{block_n}}) {
            switch (std::min<int64_t>(M - m, {{block_m}})) {
{%- for rows in range(1, block_m + 1) %}
                case {{rows}}:
                    {{kernel_name}}_kernel<{{rows}}, {{block_n}}, accum>(
                        A + m * lda, B + 2 * n, C + m * ldc + n, K, lda, ldb, ldc);
                    break;
{%- endfor %}
            }
        }
    }
}
"""


def _is_for_it(config, m, n, k, alpha, num_threads, vec_isa=None, dynamic_M=False, **kwargs) -> bool:
    """Few lanes, pairs of channels, and the instruction."""
    bf16 = vec_isa is not None and vec_isa.is_avx512_bf16_supported()
    return bf16 and alpha == 1 and not dynamic_M and m <= 2 * LANES and k % 2 == 0


@contextlib.contextmanager
def narrow_products() -> Iterator[None]:
    """Let Inductor choose among its products with this one among them, on a processor that has the instruction."""
    if not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        yield
        return
    from torch._inductor import select_algorithm  # noqa: F401  before the next: they import each other
    from torch._inductor.codegen import cpp_micro_gemm as gemm
    from torch._inductor.codegen.common import KernelTemplate
    from torch._inductor.cpu_vec_isa import VecAVX512

    class NarrowProduct(gemm.CppMicroGemm):
        """``C [M, N] = A [M, K] @ B [K, N]`` by :data:`KERNEL`."""

        def codegen_define(self, kernel) -> str:
            options = {
                "declare_kernel": self.get_kernel_declaration(),
                "kernel": kernel,
                "block_m": self.register_blocking.block_m,
                "block_n": self.register_blocking.block_n,
                "restrict_keyword": gemm.get_restrict_keyword(),
                **self.get_common_options(),
            }
            parts = (KernelTemplate._template_from_string(part) for part in (KERNEL, ENTRY))
            return "".join(part.render(options) for part in parts)

        def get_b_layout(self):
            return gemm.LayoutType.VNNI2

    gemm.micro_gemm_configs[NarrowProduct] = gemm.generate_gemm_config(
        VecAVX512,
        [(LANES, COLUMNS, 2)],
        input_dtype=torch.bfloat16,
        output_dtype=torch.float,
        compute_dtype=torch.float,
        extra_check=_is_for_it,
    )
    try:
        yield
    finally:
        del gemm.micro_gemm_configs[NarrowProduct]
