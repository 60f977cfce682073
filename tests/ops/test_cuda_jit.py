"""Run-time compilation of CUDA C++: support reasons, the cubin cache, launch arguments."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch

from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.arch import device_arch

SOURCE = """
extern "C" __global__ void scale_add(const float* x, float* y, float factor, long long offset, int count) {
  extern __shared__ float staged[];
  for (int i = threadIdx.x; i < count; i += blockDim.x) staged[i] = x[i] * factor + ADD + offset;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) y[i] = staged[count - 1 - i];
}
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "kernel.cu"
    path.write_text(SOURCE)
    return path


def needs_nvrtc(arch: str = "sm_90") -> None:
    reason = jit.available(arch)
    if reason is not None:
        pytest.skip(reason)


def test_declines_other_vendors_and_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not gfx942" in jit.available("gfx942")
    assert "not cpu" in jit.available("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    jit.available.cache_clear()
    try:
        assert "cuda-bindings" in jit.available("sm_90")
    finally:
        jit.available.cache_clear()


def test_declines_an_architecture_the_compiler_does_not_know() -> None:
    needs_nvrtc()
    assert "no target sm_10" in jit.available("sm_10")


def test_compiles_or_says_why(source: Path) -> None:
    needs_nvrtc()
    assert jit.compiles(source, "sm_90", {"ADD": 1}) is None
    missing_define = jit.compiles(source, "sm_90")
    assert 'identifier "ADD" is undefined' in missing_define


def test_a_failed_write_leaves_no_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(jit.os, "replace", full)
    target = jit.cache_dir() / "x.cubin"
    jit._write(target, b"cubin")
    assert list(jit.cache_dir().iterdir()) == []


def test_meta_tensors_launch_nothing() -> None:
    """A call with them prepares a served one: its kernels are loaded, and nothing runs."""
    tensor = torch.empty(4, device="meta")
    jit.launch(jit.Kernel("never", None), (1, 1, 1), (32, 1, 1), [tensor])


def test_cubin_is_cached_by_content_and_defines(source: Path) -> None:
    needs_nvrtc()
    assert jit.compiles(source, "sm_90", {"ADD": 1}) is None
    (cached,) = jit.cache_dir().iterdir()
    cached.write_bytes(b"from the cache")
    assert jit._cubin(source, "sm_90", (("ADD", 1),)) == b"from the cache"
    assert jit._cubin(source, "sm_90", (("ADD", 2),)) != b"from the cache"
    source.write_text(SOURCE + "\n// edited\n")
    assert jit._cubin(source, "sm_90", (("ADD", 1),)) != b"from the cache"


def test_an_edited_header_compiles_again(source: Path) -> None:
    needs_nvrtc()
    header = source.with_name("part.cuh")
    header.write_text("#define EXTRA 1\n")
    source.write_text('#include "part.cuh"\n' + SOURCE.replace("ADD", "EXTRA"))
    first = jit._cubin(source, "sm_90", ())
    header.write_text("#define EXTRA 2\n")
    assert jit._cubin(source, "sm_90", ()) != first


def test_arguments_become_c_values() -> None:
    tensor = torch.zeros(3)
    assert jit._as_ctype(tensor).value == tensor.data_ptr()
    assert jit._as_ctype(None).value is None
    assert isinstance(jit._as_ctype(7), ctypes.c_int)
    assert isinstance(jit._as_ctype(0.5), ctypes.c_float)
    assert jit._as_ctype(ctypes.c_longlong(2**40)).value == 2**40
    with pytest.raises(ValueError, match=r"4294967296.*32-bit"):
        jit._as_ctype(2**32)
    with pytest.raises(ValueError, match="'text'"):
        jit._as_ctype("text")


@pytest.mark.gpu
def test_launch_and_graph_replay(source: Path) -> None:
    count = 20_000  # 80 KB of shared memory: past the default limit
    device = torch.device("cuda", torch.cuda.current_device())
    kernel = jit.load(source, "scale_add", device_arch(device), {"ADD": 3})
    x, y = torch.randn(count, device=device), torch.full((count,), float("nan"), device=device)

    def run() -> None:
        args = (x, y, 2.0, ctypes.c_longlong(5), count)
        jit.launch(kernel, (1, 1, 1), (256, 1, 1), args, shared_bytes=4 * count)

    run()
    torch.testing.assert_close(y, (x * 2 + 8).flip(0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, (x * 2 + 8).flip(0))


@pytest.mark.gpu
def test_unknown_kernel_name(source: Path) -> None:
    with pytest.raises(RuntimeError, match="NOT_FOUND"):
        jit.load(source, "no_such_kernel", device_arch("cuda"), {"ADD": 3})
