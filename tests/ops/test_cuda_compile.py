"""The CUDA C++ kernels compile for what they claim; a GPU is not needed, NVRTC is."""

from __future__ import annotations

import random
from types import ModuleType

import pytest

from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.dense_mla import cuda as dense_mla
from nsa_backend_plugin.ops.projection import cuda as projection
from nsa_backend_plugin.ops.projection import wgmma
from nsa_backend_plugin.ops.sparse_mla import _union_lists
from nsa_backend_plugin.ops.sparse_mla import cuda as sparse_mla
from nsa_backend_plugin.ops.topk import cuda as topk
from tests.ops.test_cuda_jit import needs_nvrtc


@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_100"])
@pytest.mark.parametrize("module", [sparse_mla, dense_mla], ids=["packed", "plain"])
def test_fp8_decode(module: ModuleType, arch: str) -> None:
    """In every configuration that a call can select: `available` compiles them all."""
    needs_nvrtc(arch)
    assert module.available(arch) is None


@pytest.mark.parametrize("module", [sparse_mla, dense_mla], ids=["packed", "plain"])
def test_fp8_decode_declines_without_fp8_conversion(module: ModuleType) -> None:
    assert "not sm_80" in (module.available("sm_80") or "")


@pytest.mark.parametrize("group", [4, 8])
def test_lists_of_shared_rows(group: int) -> None:
    """Three blocks fit a multiprocessor's shared memory."""
    needs_nvrtc("sm_90")
    assert jit.compiles(_union_lists._SOURCE, "sm_90", _union_lists._defines(group)) is None
    assert 3 * (_union_lists._shared_bytes(group) + 1024) <= 228 * 1024


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_topk(arch: str) -> None:
    """On sm_90, where clusters may share a row, with three numbers of threads and blocks; elsewhere in one variant.

    Of each the deterministic one, which has more code.
    """
    needs_nvrtc(arch)
    variants = [variant for variant in topk._variants(arch) if variant.deterministic]
    for variant in random.sample(variants, 3) if arch == "sm_90" else variants[:1]:
        assert jit.compiles(topk._SOURCE, arch, topk._defines(variant)) is None


#: (fp8, norm, fp32 result), heads, rows, blocks of 128 bytes: q_a | kv_a, q_b | wq_b, wk | weights_proj, W_UK, o_proj.
PROJECTIONS = [
    (projection._Kind(True), 1, 2112, 56),
    (projection._Kind(True, True), 1, 11264, 12),
    (projection._Kind(False, False, True), 1, 192, 112),
    (projection._Kind(), 16, 512, 2),
    (projection._Kind(True), 1, 7168, 16),
]


@pytest.mark.parametrize("sizes", PROJECTIONS, ids=["q_a", "q_b", "wk", "w_uk", "o"])
def test_projection(sizes: tuple) -> None:
    """The served layer's variants, for 1 to 32 tokens; shared memory is the source's own (it asserts that)."""
    needs_nvrtc("sm_90")
    for variant in projection._variants("sm_90", projection._Sizes(*sizes), 132):
        assert variant.shared_bytes <= projection._shared_bytes("sm_90")
        assert variant.threads <= 1024
        assert jit.compiles(projection._SOURCE, "sm_90", projection._defines(variant)) is None


@pytest.mark.parametrize("sizes", [sizes for sizes in PROJECTIONS if sizes[1] == 1], ids=["q_a", "q_b", "wk", "o"])
def test_projection_by_wgmma(sizes: tuple) -> None:
    """Likewise, for 1 to 64 tokens."""
    needs_nvrtc("sm_90")
    for variant in wgmma._variants(projection._Sizes(*sizes), 132):
        assert variant.shared_bytes <= wgmma._SHARED_BYTES
        assert jit.compiles(wgmma._SOURCE, "sm_90", wgmma._defines(variant)) is None


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100"])
def test_projection_elsewhere(arch: str) -> None:
    needs_nvrtc(arch)
    assert projection.available(arch) is None
