"""The CUDA that TileLang generates for sparse MLA, run on a CPU against the reference: right addresses, waits, sums.

`emulated_cuda.h` says how. It shows no speed, and not the rules of the hardware's asynchronous proxy.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import pathlib
import random
import re
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch

from nsa_backend_plugin.ops import sparse_mla
from nsa_backend_plugin.ops.sparse_mla import reference, tilelang
from tests.ops.common import assert_close
from tools import compile_tilelang
from tools.calls import Calls, poison

HEADER = pathlib.Path(__file__).with_name("emulated_cuda.h")
ARCH = "sm_90"
BARS = {"bf16": 5e-6, "fp8": 2e-4, "packed": 2e-4}
Build = Callable[..., Callable[..., None]]

LAUNCH = """
static void* pointers[16]; static float floats[16]; static int integers[16];
static void call() {{ {call}; }}
extern "C" void launch(void** p, long* bytes, float* f, int* n, int x, int y, int z, unsigned seed) {{
  memcpy(pointers, p, sizeof pointers); memcpy(floats, f, sizeof floats); memcpy(integers, n, sizeof integers);
  emulator::readable.clear();
  for (int i = 0; i < 16; i++) if (p[i]) emulator::readable.push_back({{(char*)p[i], (char*)p[i] + bytes[i]}});
  emulator::threads = {threads}; emulator::random_state = seed; emulator::body = call;
  for (int k = 0; k < z; k++) for (int j = 0; j < y; j++) for (int i = 0; i < x; i++) {{
    blockIdx = {{i, j, k}}; emulator::run_block();
  }}
}}
"""


def translate(source: str) -> tuple[str, list[tuple[str, str]]]:
    """C++ for the emulator, and (name, type) of the kernel's parameters."""
    source = source[source.index('extern "C" __global__') :].replace("#pragma unroll", "").replace("__restrict__", "")
    shared = r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];"
    source = re.sub(shared, r"\1* \2 = (\1*)emulator::shared;", source)
    static = r"__shared__ __align__\(\d+\) int slot\[(\d+)\];"
    source = re.sub(static, r"int* slot = (int*)(emulator::shared + emulator::kShared - 4 * \1);", source)
    source = source.replace("uint64_t(desc", "(desc").replace("__nv_fp8x2_storage_t", "fp8_pair")
    found = re.search(r"__launch_bounds__\((\d+), 1\) (\w+)\((.*?)\) \{", source)
    assert found is not None
    parameters = [tuple(reversed(text.strip().rsplit(" ", 1))) for text in found[3].split(",")]
    values = [
        f"({kind})pointers[{i}]" if "*" in kind else f"{'floats' if kind == 'float' else 'integers'}[{i}]"
        for i, (_, kind) in enumerate(parameters)
    ]
    launch = LAUNCH.format(call=f"{found[2]}({', '.join(values)})", threads=found[1])
    return f'#include "{HEADER}"\n{source}{launch}', parameters


def build(
    folder: pathlib.Path, program: Callable, arguments: tuple, names: tuple[str, ...], grid: Callable
) -> Callable:
    """The kernel of a TileLang program, called as TileLang's own: with `names`, in this order."""
    lowered = compile_tilelang.lower(ARCH, compile_tilelang.Case("", functools.partial(program, *arguments), False))
    code, parameters = translate(lowered.source)
    source = folder / f"{len(list(folder.iterdir()))}.cpp"
    source.write_text(code)
    options = ("-std=c++17", "-O2", "-w", "-fpermissive", "-fno-strict-aliasing", "-fPIC", "-shared")
    subprocess.run(["g++", *options, str(source), "-o", str(source.with_suffix(".so"))], check=True)
    library = ctypes.CDLL(str(source.with_suffix(".so")))

    def kernel(*values: object) -> None:
        given = dict(zip(names, values, strict=True))
        sizes = grid(given)
        pointers, lengths = (ctypes.c_void_p * 16)(), (ctypes.c_long * 16)()
        floats, integers = (ctypes.c_float * 16)(), (ctypes.c_int * 16)()
        for i, (name, kind) in enumerate(parameters):
            if "*" in kind:
                tensor = given["kv" if name.startswith("kv") else name]
                assert tensor.is_contiguous()
                pointers[i], lengths[i] = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            elif kind == "float":
                floats[i] = given[name]
            else:
                integers[i] = sizes[name]
        library.launch(pointers, lengths, floats, integers, *sizes["grid"], random.getrandbits(31))

    return kernel


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tilelang", reason="TileLang is not installed")
    if shutil.which("g++") is None:
        pytest.skip("no g++")

    def attend_kernel(heads: int, config: tilelang.Tile, kv: str, out_dtype: str, arch: str) -> Callable:
        def sizes(given: dict) -> dict:
            (tokens, topk), splits = given["indices"].shape, given["out"].shape[1]
            grid = (tokens, splits, heads // config.heads)
            return {"tokens": tokens, "topk": topk, "splits": splits, "slots": given["kv"].shape[0], "grid": grid}

        names = ("q", "kv", "indices", "out", "lse", "scale_log2", "unit")
        return build(tmp_path, tilelang.attend_program, (heads, config, kv, out_dtype, arch), names, sizes)

    def merge_kernel(heads: int, parts: int, arch: str) -> Callable:
        def sizes(given: dict) -> dict:
            tokens, splits = given["partial"].shape[:2]
            return {"tokens": tokens, "splits": splits, "grid": (tokens, heads, 1 if parts <= 8 else 4)}

        names = ("partial", "partial_lse", "out", "lse")
        return build(tmp_path, tilelang.merge_program, (heads, parts, arch), names, sizes)

    monkeypatch.setattr(tilelang, "_attend_kernel", attend_kernel)
    monkeypatch.setattr(tilelang, "_merge_kernel", merge_kernel)


# Blocks of 16 and of 32 heads multiply by mma, of 64 by WGMMA. 132 cores have 10 splits, fewer several tiles a split.
@pytest.mark.parametrize(
    "heads, kind, topk, cores",
    [(12, "bf16", 300, 8), (65, "bf16", 300, 1), (24, "fp8", 300, 132), (16, "packed", 300, 8)],
)
def test_what_the_generated_code_computes(
    emulated: None, monkeypatch: pytest.MonkeyPatch, heads: int, kind: str, topk: int, cores: int
) -> None:
    monkeypatch.setattr(tilelang, "core_count", lambda device: cores)
    arguments = Calls(torch.device("cpu")).sparse_mla_attend(2, heads, topk, kind)
    arguments["indices"][1, 40:] = -1
    call = dataclasses.replace(sparse_mla.attend.call(**arguments, return_lse=True), arch=ARCH)
    assert tilelang.declines_attend(call) is None
    out = poison(2, heads, 512, dtype=torch.bfloat16, device="cpu")
    got, lse = tilelang.attend(dataclasses.replace(call, out=out))
    want, want_lse = reference.attend(dataclasses.replace(call, out=torch.empty(2, heads, 512)))
    assert got is out or got.data_ptr() == out.data_ptr()
    assert_close(got, want, BARS[kind])
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)
