"""The CUDA that TileLang generates for sparse MLA, run on a CPU against the reference: right addresses, waits, sums.

What it cannot show is said in `emulator`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

from nsa_backend_plugin.ops import sparse_mla
from nsa_backend_plugin.ops.sparse_mla import reference, tilelang
from tests.ops import emulator
from tests.ops.common import assert_close
from tools import compile_tilelang
from tools.calls import Calls, poison

BARS = {"bf16": 5e-6, "fp8": 2e-4, "packed": 2e-4}


def build(program: Callable, arguments: tuple, kernel: str, names: tuple[str, ...], sizes: Callable) -> Callable:
    """The kernel of a TileLang program, called as TileLang's own: with `names`, in this order."""
    case = compile_tilelang.Case(kernel, functools.partial(program, *arguments), False)
    lowered = compile_tilelang.lower(emulator.ARCH, case)
    source = '#include "tilelang.h"\n' + lowered.source[lowered.source.index('extern "C" __global__') :]
    library = emulator.build(kernel, source)

    def call(*values: object) -> None:
        given = dict(zip(names, values, strict=True))
        given |= sizes(given)
        wanted = [(kind, "kv" if name.startswith("kv") else name) for kind, name in emulator.parameters(source, kernel)]
        args = [float(given[name]) if kind == "float" else given[name] for kind, name in wanted]
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        emulator.run(kernel, library, given["grid"], (lowered.threads, 1, 1), args, tensors)

    return call


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tilelang", reason="TileLang is not installed")

    def attend_kernel(heads: int, config: tilelang.Tile, kv: str, out_dtype: str, arch: str) -> Callable:
        def sizes(given: dict) -> dict:
            (tokens, topk), splits = given["indices"].shape, given["out"].shape[1]
            grid = (tokens, splits, heads // config.heads)
            return {"tokens": tokens, "topk": topk, "splits": splits, "slots": given["kv"].shape[0], "grid": grid}

        names = ("q", "kv", "indices", "out", "lse", "scale_log2", "unit")
        arguments = (heads, config, kv, out_dtype, arch)
        return build(tilelang.attend_program, arguments, "sparse_attend_kernel", names, sizes)

    def merge_kernel(heads: int, parts: int, arch: str) -> Callable:
        def sizes(given: dict) -> dict:
            tokens, splits = given["partial"].shape[:2]
            return {"tokens": tokens, "splits": splits, "grid": (tokens, heads, 1 if parts <= 8 else 4)}

        names = ("partial", "partial_lse", "out", "lse")
        return build(tilelang.merge_program, (heads, parts, arch), "merge_splits_kernel", names, sizes)

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
    call = dataclasses.replace(sparse_mla.attend.call(**arguments, return_lse=True), arch=emulator.ARCH)
    assert tilelang.declines_attend(call) is None
    out = poison(2, heads, 512, dtype=torch.bfloat16, device="cpu")
    got, lse = tilelang.attend(dataclasses.replace(call, out=out))
    want, want_lse = reference.attend(dataclasses.replace(call, out=torch.empty(2, heads, 512)))
    assert got is out
    assert_close(got, want, BARS[kind])
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)
