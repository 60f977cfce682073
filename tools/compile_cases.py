"""Calls that launch every Triton kernel in every configuration that a call can select, for `tools.compile_matrix`.

Their tensors are on `meta`, so that what they launch is recorded and not run: a case has the types, constants and
options of a launch, and nobody writes a kernel's signature a second time. Sizes are of no special kind where Triton
compiles other code for 1 and for multiples of 16, and strides are those of a server's tensors.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from nsa_backend_plugin import ops
from nsa_backend_plugin.layouts import (
    INDEX_LAYOUTS,
    LATENT_DIM,
    PACKED_FP8,
    SCALE_FORMATS,
    index_page_bytes,
    packed_latent_bytes,
)
from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops._triton import launch as triton_launch
from nsa_backend_plugin.ops._triton import mla_launch
from nsa_backend_plugin.ops._triton.packed_rows import unpack
from nsa_backend_plugin.ops._triton.quant import declines_fp8
from nsa_backend_plugin.ops.arch import fp8_dtype, pretended
from nsa_backend_plugin.ops.dispatch import Operation, module_path
from nsa_backend_plugin.ops.mqa_logits.triton import _max_batch
from nsa_backend_plugin.ops.sparse_mla import _union_kernel, _union_lists
from tools.calls import HEAD_DIM, Arguments, Calls

#: (name, what launches it)
Launches = Iterator[tuple[str, Callable[[], object]]]
_CORES = 132  # of an H200
_SLOTS = 1 << 20
#: Bytes a lane, by architecture and kernel. sm_90: of a tile that takes 0.6 to 0.9 of the others' time nonetheless, and
#: of more programs a core, which take 0.7 of it (`mqa_logits.triton`).
#: Of targets that are tuned nowhere: gfx1201 with 128 columns and more than 1024 requests, which torch would serve
#: otherwise; sm_120 with 64 heads.
MAY_SPILL = {
    ("sm_90", "union_kernel"): 16,
    ("sm_90", "_paged_kernel"): 64,
    ("gfx1201", "_paged_kernel"): 48,
    ("sm_120", "_paged_kernel"): 8,
}


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration that the library can launch, for ahead-of-time compilation.

    signature: argument -> "*bf16", "*fp8e4nv", "i32", "fp32", ... of every argument that is not in constexprs.
    known: argument -> what Triton knows of its value, in its letters ("D": a multiple of 16). options, resident: of the
    launch.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    known: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    resident: int = 1


def gpu_target(arch: str) -> GPUTarget:
    """Triton's target of an architecture name such as "sm_90" or "gfx942"."""
    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx\w+", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"target={arch!r}: expected sm_<number> or gfx<name>")


def cases(op: str, arch: str) -> Iterator[CompileCase]:
    """Of an operation's kernels, on an architecture that they support; each once."""
    seen = []
    with pretended(arch) as device:
        for name, launch in _LAUNCHES[op](arch, Calls(device, plain=True)):
            for place, (kernel, args, options, resident) in enumerate(recorded(launch)):
                case = case_of(arch, f"{name}.{kernel.__name__}" if place else name, kernel, args, options)
                case = replace(case, resident=resident)
                if (unnamed := replace(case, name="")) not in seen:
                    seen.append(unnamed)
                    yield case


def recorded(launch: Callable[[], object]) -> list[tuple[JITFunction, tuple[Any, ...], dict[str, Any], int]]:
    """(kernel, arguments, constants and options, resident) of each Triton kernel that is launched, in order."""
    made: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any], int]] = []

    def warm_up(
        kernel: JITFunction, grid: object, args: tuple[Any, ...], options: dict[str, Any], resident: int
    ) -> None:
        made.append((kernel, args, options, resident))

    with (
        mock.patch.object(triton_launch, "warm_up", warm_up),
        mock.patch.object(_union_lists, "_kernel"),  # CUDA C++
        mock.patch.object(jit, "launch"),
        mock.patch.object(mla_launch, "core_count", return_value=_CORES),
    ):
        launch()
    return made


def case_of(arch: str, name: str, kernel: JITFunction, args: Sequence[Any], options: Mapping[str, Any]) -> CompileCase:
    """What Triton makes of a launch: None and 1 are constants, and it looks whether others are multiples of 16."""
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(gpu_target(arch)))
    values, specialized, rest = bind(*args, **options)
    kinds = dict(zip(kernel.arg_names, specialized, strict=True))
    return CompileCase(
        name,
        kernel,
        signature={argument: kind for argument, (kind, _) in kinds.items() if kind != "constexpr"},
        constexprs={argument: values[argument] for argument, (kind, _) in kinds.items() if kind == "constexpr"},
        known={argument: known for argument, (kind, known) in kinds.items() if kind != "constexpr" and known},
        options=rest,
    )


def _runs(operation: Operation, arguments: Arguments, impl: str = "triton", **more: Any) -> Callable[[], object]:
    """Of a call that an implementation takes; of another one nothing."""

    def run() -> object:
        module = importlib.import_module(module_path(operation.op, impl))
        call = operation.call(**arguments, **more)
        declines = getattr(module, f"declines_{operation.function}", lambda call: None)
        return None if declines(call) else getattr(module, operation.function)(call)

    return run


def _concat(arch: str, make: Calls) -> Launches:
    for tokens in (8, 1 << 16):
        yield f"q_all.bf16.rows{16 * tokens}", _runs(ops.concat.q_all, make.concat_q_all(tokens, 16))
        for kind, dtype in (("bf16", torch.bfloat16), ("fp8", fp8_dtype(make.device))):
            arguments = make.concat_mla_k(tokens, 16)
            yield f"mla_k.{kind}.rows{16 * tokens}", _runs(ops.concat.mla_k, arguments, dtype=dtype)


def _norm_quant(arch: str, make: Calls) -> Launches:
    for width, scale_format in ((1536, "fp32"), (1536, "ue8m0"), (2048, "fp32")):
        arguments = make.norm_quant_rms(3, width)
        yield f"rms.{width}.{scale_format}", _runs(ops.norm_quant.rms, arguments, scale_format=scale_format)


def _projection(arch: str, make: Calls) -> Launches:
    for tokens, tile in ((3, 16), (67, 64)):
        for name, rows, depth, fp8, norm, dtype in (
            ("fp8", 2112, 7168, True, False, torch.bfloat16),
            ("fp8.norm", 5120, 1536, True, True, torch.bfloat16),
            ("bf16.fp32", 192, 7168, False, False, torch.float32),
            ("bf16.norm", 5120, 1536, False, True, torch.bfloat16),
        ):
            arguments = make.projection_linear(tokens, rows, depth, fp8, norm)
            yield f"{name}.{tile}", _runs(ops.projection.linear, arguments, dtype=dtype)
        arguments = make.projection_per_head(tokens, 16, LATENT_DIM, 128)
        yield f"bf16.head.{tile}", _runs(ops.projection.per_head, arguments)


def _indexer_prep(arch: str, make: Calls) -> Launches:
    # Every variant in one configuration; in the others what decides about registers: the rotation.
    every = [(3, scale_format, INDEX_LAYOUTS) for scale_format in SCALE_FORMATS]
    for tokens, scale_format, layouts in (*every, (33, "fp32", ("row_major",)), (133, "fp32", ("row_major",))):
        for is_neox in (False, True):
            variant = {"is_neox": is_neox, "scale_format": scale_format}
            name = f"{'neox' if is_neox else 'interleaved'}.{scale_format}.rows"
            query = make.indexer_prep_query(tokens, 64)
            yield f"query.{name}{64 * tokens}", _runs(ops.indexer_prep.query, query, **variant)
            rows = 64 * tokens + 1
            for layout in layouts:
                key = make.indexer_prep_key_store(rows, layout)
                yield f"key_store.{layout}.{name}{rows}", _runs(ops.indexer_prep.key_store, key, **variant)


def _index_key_cache(arch: str, make: Calls) -> Launches:
    for layout in INDEX_LAYOUTS:
        for tokens in (67, 8191):
            for scale_format in SCALE_FORMATS:
                store = make.index_key_cache_store(tokens, layout)
                name = f"store.{layout}.{scale_format}.T{tokens}"
                yield name, _runs(ops.index_key_cache.store, store, scale_format=scale_format)
        for batch in (3, 255):
            gather = make.index_key_cache_gather([8256] * batch, layout, cache=_pages(make))
            yield f"gather.{layout}.B{batch}", _runs(ops.index_key_cache.gather, gather, total_tokens=8256 * batch)


def _latent_cache(arch: str, make: Calls) -> Launches:
    for tokens in (67, 8191):
        rows, packed = make.rows(tokens, HEAD_DIM), _cache(make, "packed")[:tokens, 0]
        yield f"quantize.rows{tokens}", _runs(ops.latent_cache.quantize, {"kv": rows})
        yield f"dequantize.rows{tokens}", _runs(ops.latent_cache.dequantize, {"packed": packed})
        if declines_fp8(arch, PACKED_FP8) is None:
            slots = torch.empty(tokens, dtype=torch.int32, device=make.device)
            yield f"dequantize.slots.rows{tokens}", partial(unpack, packed, rows, LATENT_DIM, slots=slots)
        for kind in ("bf16", "fp8", "packed"):
            for is_neox in (False, True) if tokens == 67 else (True,):
                store = make.latent_cache_store(tokens, kind, 16, cache=_cache(make, kind))
                more = {"k_rope_out": torch.empty_like(store["k_rope"]), "norm_weight": make.rows(LATENT_DIM)}
                name = f"store.{kind}.{'neox' if is_neox else 'interleaved'}.T{tokens}"
                yield name, _runs(ops.latent_cache.store, store, is_neox=is_neox, **more)


def _mqa_logits(arch: str, make: Calls) -> Launches:
    def paged(batch: int, heads: int, next_n: int, layout: str = "row_major") -> Callable[[], object]:
        arguments = make.mqa_logits_paged([8256] * batch, heads, next_n, layout, cache=_pages(make))
        if next_n == 2:
            arguments["context_lens"] = arguments["context_lens"][:, None].expand(-1, 2)
        return _runs(ops.mqa_logits.paged, arguments, clean=True)

    for heads in (8, 32, 64, 128):
        for next_n in (1, 2, 4):
            for layout in INDEX_LAYOUTS if next_n == 1 else ("row_major",):
                yield f"paged {layout} {heads} heads next_n {next_n}", paged(63, heads, next_n, layout)
    # Registers hold the tile counts of the whole batch: its extremes, with the narrowest and the widest tile.
    for heads, next_n in ((8, 1), (64, 1), (64, 2), (128, 2)):
        for batch in (1, 255, _max_batch(arch)):
            yield f"paged {heads} heads next_n {next_n} batch {batch}", paged(batch, heads, next_n)
    for heads in (8, 32, 64, 128):
        arguments = make.mqa_logits_ragged(4095, 8191, heads)
        yield f"ragged {heads} heads", _runs(ops.mqa_logits.ragged, arguments, clean=True)


def _topk(arch: str, make: Calls) -> Launches:
    for columns, name, starts in ((32768, "long", None), (8192, "short", [0] * 67)):
        arguments = make.topk_select([2050] * 67, columns, 2048, starts=starts, pad=0)
        table = torch.empty(67, columns // 64, dtype=torch.int32, device=make.device)
        more = {"page_table": table, "page_size": 64, "page_rows": arguments["row_starts"]}
        yield f"select k 2048 {name} rows", _runs(ops.topk.select, arguments, **more)


#: Of each tile the head count with masks, if there is one.
_HEADS = (8, 32, 128)


def _sparse_mla(arch: str, make: Calls) -> Launches:
    def attend(tokens: int, heads: int, kind: str, impl: str = "triton") -> Callable[[], object]:
        indices = torch.empty(tokens, 2048, dtype=torch.int32, device=make.device)
        arguments = make.sparse_mla_attend(tokens, heads, 2048, kind, kv=_cache(make, kind), indices=indices)
        return _runs(ops.sparse_mla.attend, arguments, impl, lengths=indices[:, 0].contiguous(), return_lse=True)

    for kind in ("bf16", "packed", "fp8"):
        for heads in _HEADS:
            for split, tokens in ((True, 3), (False, 4095)):
                name = f"{kind} heads={heads} page=0 split={split} {mla_launch.tile(arch, kind, heads)}"
                yield name, attend(tokens, heads, kind)
    if arch in _union_kernel.TILES:
        for heads in (1, 8, 12, 16):  # groups of every size, with and without rows of padding
            yield f"union heads={heads} {_union_kernel.TILES[arch]}", attend(4095, heads, "bf16", "union")


def _dense_mla(arch: str, make: Calls) -> Launches:
    def decode(batch: int, heads: int, kind: str, page_size: int, splits: int) -> Callable[[], object]:
        lengths, cache = [8192] * batch, _cache(make, kind)
        arguments = make.dense_mla_decode(lengths, heads, page_size, kind, kv=cache)
        return _runs(ops.dense_mla.decode, arguments, num_kv_splits=splits, return_lse=True)

    for kind, tiles in (("bf16", "pages"), ("fp8", "fp8")):
        for page_size in (1, 64):
            for heads in _HEADS:
                for splits in (3, 1):
                    tile = mla_launch.tile(arch, tiles, heads)
                    name = f"{kind} heads={heads} page={page_size} split={splits > 1} {tile}"
                    yield name, decode(3, heads, kind, page_size, splits)
    for batch, splits in ((1, 128), (8, 16), (8, 128), (128, 2)):  # the extremes of merging
        yield f"bf16 batch={batch} splits={splits}", decode(batch, 16, "bf16", 64, splits)


def _pages(make: Calls) -> torch.Tensor:
    """An index-K cache."""
    return torch.empty(_SLOTS // 64, index_page_bytes(), dtype=torch.uint8, device=make.device)


def _cache(make: Calls, kind: str) -> torch.Tensor:
    """A latent cache."""
    width = packed_latent_bytes(HEAD_DIM) if kind == "packed" else HEAD_DIM
    dtype = {"packed": torch.uint8, "bf16": torch.bfloat16, "fp8": fp8_dtype(make.device)}[kind]
    return torch.empty(_SLOTS, 1, width, dtype=dtype, device=make.device)


_LAUNCHES: dict[str, Callable[[str, Calls], Launches]] = {
    "concat": _concat,
    "dense_mla": _dense_mla,
    "index_key_cache": _index_key_cache,
    "indexer_prep": _indexer_prep,
    "latent_cache": _latent_cache,
    "mqa_logits": _mqa_logits,
    "norm_quant": _norm_quant,
    "projection": _projection,
    "sparse_mla": _sparse_mla,
    "topk": _topk,
}
