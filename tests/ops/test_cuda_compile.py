"""The CUDA C++ kernels compile for what they claim; a GPU is not needed, NVRTC is."""

from __future__ import annotations

from types import ModuleType

import pytest

from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.dense_mla import cuda as dense_mla
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


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100"])
def test_topk(arch: str) -> None:
    """On sm_90, where clusters may share a row, with every number of threads and blocks; elsewhere in one variant.

    Of each the deterministic one, which has more code.
    """
    needs_nvrtc(arch)
    variants = [variant for variant in topk._variants(arch) if variant.deterministic]
    for variant in variants if arch == "sm_90" else variants[:1]:
        assert jit.compiles(topk._SOURCE, arch, topk._defines(variant)) is None
