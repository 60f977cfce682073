# mypy: disable-error-code="valid-type"
"""Sparse MLA decode in TileLang, one source for CUDA and ROCm: bf16 rows, or plain fp8 rows with one scalar scale.

One block per token, split of its selected rows and block of heads; a second kernel merges the splits. Sizes that vary
from call to call (tokens, top-k, splits, slots) are symbolic: one compilation per head count and dtype.
On AMD: compile-checked, not run.
"""

# No `from __future__ import annotations`: TileLang reads the annotations of its functions, which name local variables.
import functools
from typing import Any

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._torch.mla import result as as_result
from nsa_backend_plugin.ops._vendor import mla, probe
from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

_ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")
_TILE = 32  # selected rows per step
_MAX_SPLITS = 32
_BLOCKS = 512  # programs that fill a large GPU about twice
_LOG2_E = 1.4426950408889634
_NO_SCORE = -1e30  # start of the running maximum: finite, so that -inf - max is -inf


def available(arch: str) -> Reason:
    if arch not in _ARCHS:
        return f"TileLang sparse decode needs {', '.join(_ARCHS)}, not {arch}"
    return probe.missing("tilelang", "compile")


def declines_attend(call: Attend) -> Reason:
    if call.kind == "packed" or call.kv.dtype not in (torch.bfloat16, *FP8_DTYPES):
        return f"kv is {call.kind} ({call.kv.dtype}): only bfloat16 and plain fp8 rows"
    if call.indices.shape[1] == 0:
        return "top-k 0"
    return mla.shape_limits(call)


def attend(call: Attend) -> Result:
    q, kv, indices, arch = call.q, call.kv, call.indices, call.arch
    tokens, heads, dim = q.shape
    unit = 1.0 if call.kv_scale is None else float(call.kv_scale)
    block = head_block(heads, arch)
    padded = mla.pad_heads(q, -(-heads // block) * block)
    splits = _split_count(tokens * padded.shape[1] // block, indices.shape[1])

    width = padded.shape[1]
    result = call.output() if padded is q else q.new_empty(tokens, width, LATENT_DIM)
    result_lse = q.new_empty(tokens, width, dtype=torch.float32)
    if splits == 1:
        partial, partial_lse = result.unsqueeze(1), result_lse.unsqueeze(1)
    else:
        partial = q.new_empty(tokens, splits, width, LATENT_DIM, dtype=torch.float32)
        partial_lse = q.new_empty(tokens, splits, width, dtype=torch.float32)
    kernel = _attend_kernel(width, block, NAMES[kv.dtype], NAMES[partial.dtype], arch)
    scale = call.softmax_scale * _LOG2_E * unit
    kernel(padded, kv.view(-1, dim), indices, partial, partial_lse, scale, unit)
    if splits > 1:
        _merge_kernel(width, arch)(partial, partial_lse, result, result_lse)
    if call.out is not None and padded is not q:
        result = call.out.copy_(result[:, :heads])
    return as_result(result[:, :heads], result_lse[:, :heads] if call.return_lse else None)


NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e4m3fnuz: "float8_e4m3fnuz",
}


def head_block(heads: int, arch: str) -> int:
    """Heads per block: the matrix instructions' 16 rows, or 32 where that saves a second gather and fits into LDS."""
    return 16 if heads <= 16 or arch == "gfx942" else 32


def _split_count(blocks: int, topk: int) -> int:
    tiles = -(-topk // _TILE)
    return max(1, min(_MAX_SPLITS, tiles, _BLOCKS // blocks))


def target(arch: str) -> str | dict[str, str]:
    """TileLang's name of an architecture."""
    if is_cuda(arch):
        return {"kind": "cuda", "arch": f"{arch}a" if arch == "sm_90" else arch}
    return {"kind": "hip", "mcpu": arch}


@functools.cache
def _attend_kernel(heads: int, block: int, kv_dtype: str, out_dtype: str, arch: str) -> Any:
    import tilelang

    return tilelang.compile(attend_program(heads, block, kv_dtype, out_dtype), target=target(arch))


@functools.cache
def _merge_kernel(heads: int, arch: str) -> Any:
    import tilelang

    return tilelang.compile(merge_program(heads), target=target(arch))


def attend_program(heads: int, block: int, kv_dtype: str, out_dtype: str) -> Any:
    """TileLang function (q, kv, indices, out, lse, scale_log2, unit); out and lse have a dimension of splits.

    heads: a multiple of `block`, the heads of a program.
    """
    import tilelang.language as T

    tokens, slots, topk, splits = (T.dynamic(name) for name in ("tokens", "slots", "topk", "splits"))
    dim, rope = LATENT_DIM, ROPE_DIM

    @T.prim_func
    def sparse_attend(
        q: T.Tensor([tokens, heads, dim + rope], "bfloat16"),
        kv: T.Tensor([slots, dim + rope], kv_dtype),
        indices: T.Tensor([tokens, topk], "int32"),
        out: T.Tensor([tokens, splits, heads, dim], out_dtype),
        lse: T.Tensor([tokens, splits, heads], "float32"),
        scale_log2: T.float32,
        unit: T.float32,
    ):
        with T.Kernel(tokens, splits, heads // block, threads=128) as (token, split, head_block):
            q_value = T.alloc_shared([block, dim], "bfloat16")
            q_rope = T.alloc_shared([block, rope], "bfloat16")
            value = T.alloc_shared([_TILE, dim], "bfloat16")
            key_rope = T.alloc_shared([_TILE, rope], "bfloat16")
            probability = T.alloc_shared([block, _TILE], "bfloat16")
            slot = T.alloc_shared([_TILE], "int32")
            scores = T.alloc_fragment([block, _TILE], "float32")
            sums = T.alloc_fragment([block, dim], "float32")
            maximum = T.alloc_fragment([block], "float32")
            previous = T.alloc_fragment([block], "float32")
            rescale = T.alloc_fragment([block], "float32")
            total = T.alloc_fragment([block], "float32")
            tile_total = T.alloc_fragment([block], "float32")

            first_head = head_block * block
            T.copy(q[token, first_head : first_head + block, :dim], q_value)
            T.copy(q[token, first_head : first_head + block, dim:], q_rope)
            T.fill(sums, 0)
            T.fill(total, 0)
            T.fill(maximum, _NO_SCORE)

            # In variables, because the compiler's prover gives up on products of symbols inside addresses.
            bounds = T.alloc_local([2], "int32")
            bounds[0] = T.ceildiv(topk, _TILE) * split // splits
            bounds[1] = T.ceildiv(topk, _TILE) * (split + 1) // splits
            for tile in T.serial(bounds[1] - bounds[0]):
                for j in T.Parallel(_TILE):
                    position = (bounds[0] + tile) * _TILE + j
                    slot[j] = T.if_then_else(position < topk, indices[token, position], -1)
                # Missing rows become zeros: a masked probability of 0 must not meet a NaN of an unused slot.
                for j, d in T.Parallel(_TILE, dim):
                    value[j, d] = T.if_then_else(
                        slot[j] >= 0, T.cast(T.cast(kv[slot[j], d], "float32"), "bfloat16"), T.bfloat16(0)
                    )
                for j, d in T.Parallel(_TILE, rope):
                    key_rope[j, d] = T.if_then_else(
                        slot[j] >= 0, T.cast(T.cast(kv[slot[j], dim + d], "float32"), "bfloat16"), T.bfloat16(0)
                    )
                T.clear(scores)
                T.gemm(q_value, value, scores, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
                T.gemm(q_rope, key_rope, scores, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
                for i, j in T.Parallel(block, _TILE):
                    scores[i, j] = T.if_then_else(slot[j] >= 0, scores[i, j] * scale_log2, -T.infinity("float32"))
                T.copy(maximum, previous)
                T.reduce_max(scores, maximum, dim=1, clear=False)
                for i in T.Parallel(block):
                    rescale[i] = T.exp2(previous[i] - maximum[i])
                for i, j in T.Parallel(block, _TILE):
                    scores[i, j] = T.exp2(scores[i, j] - maximum[i])
                T.reduce_sum(scores, tile_total, dim=1)
                for i in T.Parallel(block):
                    total[i] = total[i] * rescale[i] + tile_total[i]
                for i, d in T.Parallel(block, dim):
                    sums[i, d] = sums[i, d] * rescale[i]
                T.copy(scores, probability)
                T.gemm(probability, value, sums, policy=T.GemmWarpPolicy.FullCol)

            for i, d in T.Parallel(block, dim):
                out[token, split, first_head + i, d] = T.if_then_else(
                    total[i] == 0, T.float32(0), sums[i, d] * unit / total[i]
                )
            for i in T.Parallel(block):
                lse[token, split, first_head + i] = T.if_then_else(
                    total[i] == 0, -T.infinity("float32"), (maximum[i] + T.log2(total[i])) / T.float32(_LOG2_E)
                )

    return sparse_attend


def merge_program(heads: int) -> Any:
    """TileLang function (partial, partial_lse, out, lse): splits combined by their log-sum-exps, in order."""
    import tilelang.language as T

    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")
    dim = LATENT_DIM

    @T.prim_func
    def merge_splits(
        partial: T.Tensor([tokens, splits, heads, dim], "float32"),
        partial_lse: T.Tensor([tokens, splits, heads], "float32"),
        out: T.Tensor([tokens, heads, dim], "bfloat16"),
        lse: T.Tensor([tokens, heads], "float32"),
    ):
        with T.Kernel(tokens, heads, threads=128) as (token, head):
            sums = T.alloc_fragment([dim], "float32")
            maximum = T.alloc_local([1], "float32")
            total = T.alloc_local([1], "float32")
            weight = T.alloc_local([1], "float32")
            T.clear(sums)
            maximum[0] = _NO_SCORE
            total[0] = 0
            for split in T.serial(splits):
                maximum[0] = T.max(maximum[0], partial_lse[token, split, head])
            for split in T.serial(splits):
                weight[0] = T.exp2((partial_lse[token, split, head] - maximum[0]) * T.float32(_LOG2_E))
                total[0] += weight[0]
                for d in T.Parallel(dim):
                    sums[d] += weight[0] * partial[token, split, head, d]
            for d in T.Parallel(dim):
                out[token, head, d] = T.if_then_else(total[0] == 0, T.float32(0), sums[d] / total[0])
            lse[token, head] = T.if_then_else(
                total[0] == 0, -T.infinity("float32"), maximum[0] + T.log2(total[0]) / T.float32(_LOG2_E)
            )

    return merge_splits
