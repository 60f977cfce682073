# mypy: disable-error-code="valid-type"
"""Sparse MLA decode in TileLang, one source for CUDA and ROCm: bf16 rows, plain fp8 rows with one scalar scale, packed.

One block per token, split of its selected rows and block of heads; a second kernel merges the splits. Sizes that vary
from call to call (tokens, top-k, splits, slots) are symbolic: one compilation per head count and dtype.
docs/tilelang.md says what the generated code does and why the kernel has this form. On AMD: compile-checked, not run.
"""

# No `from __future__ import annotations`: TileLang reads the annotations of its functions, which name local variables.
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, LATENT_DIM, LATENT_TILE, ROPE_DIM, packed_latent_bytes
from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._torch.mla import result as as_result
from nsa_backend_plugin.ops._vendor import mla, probe
from nsa_backend_plugin.ops.arch import core_count, is_cuda, launches_early
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

_ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")
_LEAST_KEYS = 128  # keys of a split below which more splits gain nothing, but on cores that would have none
_LOG2_E = 1.4426950408889634
_NO_SCORE = -1e30  # start of the running maximum: finite, so that -inf - max is -inf
_PACKED = "packed"
_PACKED_BYTES = packed_latent_bytes(LATENT_DIM + ROPE_DIM)
_SCALES = LATENT_DIM // LATENT_TILE

#: Tiles are copied and waited for by hand: neither bulk copies nor warps that only copy, which TileLang would insert.
PASS_CONFIGS = {"tl.disable_tma_lower": True, "tl.disable_warp_specialized": True}


@dataclass(frozen=True)
class Tile:
    """What a block of the attention kernel holds.

    buffers: tiles of rows in shared memory; of two, one arrives while the other is multiplied.
    per_core: blocks that a multiprocessor (compute unit) holds at once (registers, shared memory).
    """

    heads: int
    keys: int
    threads: int
    buffers: int
    per_core: int

    @property
    def by_row(self) -> bool:
        """Whether scores go through shared memory so that a softmax row lies in one warp.

        As the product leaves them, every warp has a few keys of all heads, and each maximum is an exchange of all
        warps. 64 heads have no shared memory left for it, and two groups of warps to exchange between.
        """
        return self.heads < 64


def tile(arch: str, heads: int) -> Tile:
    """WGMMA multiplies 64 rows and the older instructions 16: heads are padded to the smallest that holds them."""
    if not is_cuda(arch):
        # No asynchronous copies that TileLang could use: a second tile in LDS would only cost blocks.
        wide = heads > 16 and arch != "gfx942"  # 80 KB
        return Tile(32 if wide else 16, 32, 128, buffers=1, per_core=1 if wide or arch == "gfx942" else 2)
    if heads > 32 and arch == "sm_90":
        return Tile(64, 64, 256, buffers=2, per_core=1)
    if heads > 16 and arch in ("sm_80", "sm_90", "sm_100", "sm_103"):  # 117 KB
        return Tile(32, 32, 256, buffers=2, per_core=1)
    return Tile(16, 32, 128, buffers=2, per_core=2 if arch in ("sm_90", "sm_100", "sm_103") else 1)


def available(arch: str) -> Reason:
    if arch not in _ARCHS:
        return f"TileLang sparse decode needs {', '.join(_ARCHS)}, not {arch}"
    return probe.missing("tilelang", "compile")


def declines_attend(call: Attend) -> Reason:
    if call.kind == "packed" and not is_cuda(call.arch):
        return f"kv is {call.kind}: on {call.arch} only bfloat16 and plain fp8 rows"
    if call.kind != "packed" and call.kv.dtype not in (torch.bfloat16, *FP8_DTYPES):
        return f"kv is {call.kind} ({call.kv.dtype}): only bfloat16 and fp8 rows"
    if call.indices.shape[1] == 0:
        return "top-k 0"
    return mla.shape_limits(call)


def attend(call: Attend) -> Result:
    q, kv, indices, arch = call.q, call.kv, call.indices, call.arch
    tokens, heads, _ = q.shape
    config = tile(arch, heads)
    padded = mla.pad_heads(q, -(-heads // config.heads) * config.heads)
    width = padded.shape[1]
    splits = split_count(core_count(q.device), tokens * width // config.heads, indices.shape[1], config)

    result = call.output() if padded is q else q.new_empty(tokens, width, LATENT_DIM)
    result_lse = q.new_empty(tokens, width, dtype=torch.float32)
    if splits == 1:
        partial, partial_lse = result.unsqueeze(1), result_lse.unsqueeze(1)
    else:
        partial = q.new_empty(tokens, splits, width, LATENT_DIM, dtype=torch.float32)
        partial_lse = q.new_empty(tokens, splits, width, dtype=torch.float32)
    rows = kv.view(torch.float8_e4m3fn) if call.kind == "packed" else kv
    name = _PACKED if call.kind == "packed" else NAMES[kv.dtype]
    kernel = _attend_kernel(width, config, name, NAMES[partial.dtype], arch)
    scale = call.softmax_scale * _LOG2_E * call.kv_unit
    kernel(padded, rows.view(-1, rows.shape[-1]), indices, partial, partial_lse, scale, call.kv_unit)
    if splits > 1:
        _merge_kernel(width, merge_parts(splits), arch)(partial, partial_lse, result, result_lse)
    if padded is not q:
        result, result_lse = result[:, :heads], result_lse[:, :heads]
        if call.out is not None:
            result = call.out.copy_(result)
    return as_result(result, result_lse if call.return_lse else None)


NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e4m3fnuz: "float8_e4m3fnuz",
}
#: Splits that a form of the merge kernel takes.
MERGES = (8, 64)


def split_count(cores: int, blocks: int, topk: int, config: Tile) -> int:
    """Splits of each token's rows: as many as fill the device once, none without a tile of keys.

    Once, because a block that waits for another's end costs as much as that block.
    """
    worthwhile = max(topk // _LEAST_KEYS, cores // blocks)
    tiles = -(-topk // config.keys)
    return max(1, min(config.per_core * cores // blocks, worthwhile, tiles, MERGES[-1]))


def merge_parts(splits: int) -> int:
    return next(parts for parts in MERGES if splits <= parts)


def target(arch: str) -> str | dict[str, str]:
    """TileLang's name of an architecture."""
    if is_cuda(arch):
        return {"kind": "cuda", "arch": f"{arch}a" if arch == "sm_90" else arch}
    return {"kind": "hip", "mcpu": arch}


@functools.cache
def _attend_kernel(heads: int, config: Tile, kv: str, out_dtype: str, arch: str) -> Any:
    import tilelang

    program = attend_program(heads, config, kv, out_dtype, arch)
    return tilelang.compile(program, target=target(arch), pass_configs=PASS_CONFIGS)


@functools.cache
def _merge_kernel(heads: int, parts: int, arch: str) -> Any:
    import tilelang

    return tilelang.compile(merge_program(heads, parts, arch), target=target(arch), pass_configs=PASS_CONFIGS)


def attend_program(heads: int, config: Tile, kv: str, out_dtype: str, arch: str) -> Any:
    """TileLang function (q, kv, indices, out, lse, scale_log2, unit); out and lse have a dimension of splits.

    heads: a multiple of `config.heads`, the heads of a program. kv: a dtype of `NAMES`, or "packed".
    """
    import tilelang.language as T

    tokens, slots, topk, splits = (T.dynamic(name) for name in ("tokens", "slots", "topk", "splits"))
    dim, rope = LATENT_DIM, ROPE_DIM
    block, keys, buffers, by_row = config.heads, config.keys, config.buffers, config.by_row
    packed = kv == _PACKED
    row = _PACKED_BYTES if packed else dim + rope
    kv_dtype = "float8_e4m3fn" if packed else kv
    # A copy that converts is not asynchronous: fp8 rows arrive as they are and are widened in shared memory.
    staged = kv_dtype != "bfloat16" and buffers > 1
    places = 4 if buffers > 1 else 1
    early = launches_early(arch) and out_dtype == "float32"
    # Copies that the loop itself waits for.
    asynchronous = {"prefer_async": True, "annotations": {"parallel_async_without_async_commit_wait": True}}
    arriving = asynchronous if buffers > 1 else {}

    @T.macro
    def find(slot, indices, token, tile, step):
        """The slots of a tile of keys, for `step` of the loop."""
        for j in T.Parallel(keys):
            position = tile * keys + j
            slot[step % places, j] = T.if_then_else(position < topk, indices[token, position], -1)

    def by_line(place):
        """Which thread copies what: eight threads 128 bytes of one row, so that few slots concern a thread."""
        size = 2 if place.dtype == "bfloat16" else 4 if place.dtype == "float32" else 1
        vector, width = 16 // size, int(place.shape[2])
        lanes = math.gcd(8, width // vector)
        rows = config.threads // lanes

        def thread_and_index(j, d):
            line = j // rows * (width // (vector * lanes)) + d // (vector * lanes)
            return j % rows * lanes + d // vector % lanes, line * vector + d % vector

        return T.Fragment([keys, width], forward_fn=thread_and_index)

    @T.macro
    def gather(rows, first, slot, place, step):
        """A part of a tile's rows. Missing rows become zeros: a probability of 0 must not meet an unused slot's NaN."""
        mine = T.alloc_fragment([keys], "int32")  # in registers: a copy would read its slot four times
        for j in T.Parallel(keys):
            mine[j] = slot[step % places, j]
        for j, d in T.Parallel(keys, place.shape[2], **arriving, loop_layout=by_line(place)):
            place[step % place.shape[0], j, d] = T.if_then_else(
                mine[j] >= 0, rows[mine[j], first + d], T.cast(0, rows.dtype)
            )

    def gather_parts(parts, slot, step):
        for rows, first, place in parts:
            gather(rows, first, slot, place, step)

    @T.macro
    def gather_widened(rows, first, slot, place):
        for j, d in T.Parallel(keys, place.shape[2]):
            place[0, j, d] = T.if_then_else(
                slot[0, j] >= 0, T.cast(T.cast(rows[slot[0, j], first + d], "float32"), "bfloat16"), T.bfloat16(0)
            )

    @T.macro
    def add_scaled_part(products, part, q_value, value, scales, now, c, dims):
        T.clear(part)
        T.gemm(q_value[c, :, :], value[0, :, dims], part, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
        for i, j in T.Parallel(block, keys):
            products[i, j] = products[i, j] + part[i, j] * scales[now, j, c]

    def add_scaled(*operands):
        """Scores of packed rows. A loop of Python, because T.gemm wants parts of operands whose size it can see."""
        for c in range(_SCALES):
            add_scaled_part(*operands, c, slice(c * LATENT_TILE, (c + 1) * LATENT_TILE))

    @T.prim_func
    def sparse_attend(
        q: T.Tensor([tokens, heads, dim + rope], "bfloat16"),
        kv: T.Tensor([slots, row], kv_dtype),
        indices: T.Tensor([tokens, topk], "int32"),
        out: T.Tensor([tokens, splits, heads, dim], out_dtype),
        lse: T.Tensor([tokens, splits, heads], "float32"),
        scale_log2: T.float32,
        unit: T.float32,
    ):
        with T.Kernel(tokens, splits, heads // block, threads=config.threads) as (token, split, head_block):
            # T.gemm takes the length of a product from the first operand's buffer, whatever part of it is named.
            q_value = T.alloc_shared([_SCALES, block, LATENT_TILE] if packed else [block, dim], "bfloat16")
            q_rope = T.alloc_shared([block, rope], "bfloat16")
            value = T.alloc_shared([1 if staged else buffers, keys, dim], "bfloat16")
            key_rope = T.alloc_shared([1 if staged and not packed else buffers, keys, rope], "bfloat16")
            # Of four tiles: two ahead, the present one, and one that a late warp may still read. Static memory, because
            # TileLang puts barriers between copies and reads of the memory that the copies write to.
            slot = T.alloc_shared([places, keys], "int32", scope="shared" if buffers > 1 else "shared.dyn")
            scores = T.alloc_fragment([block, keys], "float32")
            weights = T.alloc_fragment([block, keys], "float32")
            sums = T.alloc_fragment([block, dim], "float32")
            maximum = T.alloc_fragment([block], "float32")
            previous = T.alloc_fragment([block], "float32")
            rescale = T.alloc_fragment([block], "float32")
            total = T.alloc_fragment([block], "float32")
            # What of a row arrives where: (rows, first element, place).
            parts = [(kv, 0, value), (kv, dim, key_rope)]
            if staged:
                raw = T.alloc_shared([buffers, keys, dim if packed else dim + rope], kv_dtype)
                parts = [(kv, 0, raw)]
            if packed:
                scales = T.alloc_shared([buffers, keys, _SCALES], "float32")
                part = T.alloc_fragment([block, keys], "float32")
                kv_scale = T.Tensor([slots, row // 4], "float32", kv.data)
                kv_rope = T.Tensor([slots, row // 2], "bfloat16", kv.data)
                parts = [*parts, (kv_scale, dim // 4, scales), (kv_rope, dim // 2 + 2 * _SCALES, key_rope)]
            if by_row:
                product = T.alloc_fragment([block, keys], "float32")
                product_shared = T.alloc_shared([block, keys], "float32")
                rescale_shared = T.alloc_shared([block], "float32")
                probability = T.alloc_shared([block, keys], "bfloat16")

            # In variables, because the compiler's prover gives up on products of symbols inside addresses.
            bounds = T.alloc_local([2], "int32")
            bounds[0] = T.ceildiv(topk, keys) * split // splits
            bounds[1] = T.ceildiv(topk, keys) * (split + 1) // splits
            first_head = head_block * block
            if buffers > 1:
                find(slot, indices, token, bounds[0], 0)
                find(slot, indices, token, bounds[0] + 1, 1)
                T.sync_threads()
                gather_parts(parts, slot, 0)
                T.ptx_commit_group()
            if packed:
                for c, i, d in T.Parallel(_SCALES, block, LATENT_TILE):
                    q_value[c, i, d] = q[token, first_head + i, c * LATENT_TILE + d]
            else:
                T.copy(q[token, first_head : first_head + block, :dim], q_value)
            T.copy(q[token, first_head : first_head + block, dim:], q_rope)
            T.fill(sums, 0)
            T.fill(weights, 0)
            T.fill(maximum, _NO_SCORE)

            for step in T.serial(bounds[1] - bounds[0]):
                if buffers > 1:
                    T.ptx_wait_group(0)
                    T.sync_threads()
                    if step + 1 < bounds[1] - bounds[0]:
                        gather_parts(parts, slot, step + 1)
                        T.ptx_commit_group()
                        find(slot, indices, token, bounds[0] + step + 2, step + 2)
                else:
                    find(slot, indices, token, bounds[0] + step, 0)
                    gather_widened(kv, 0, slot, value)
                    gather_widened(kv, dim, slot, key_rope)
                if staged:
                    for j, d in T.Parallel(keys, dim):
                        value[0, j, d] = T.cast(raw[step % 2, j, d], "float32")
                    if not packed:
                        for j, d in T.Parallel(keys, rope):
                            key_rope[0, j, d] = T.cast(raw[step % 2, j, dim + d], "float32")

                now = step % value.shape[0]
                now_rope = step % key_rope.shape[0]
                now_slot = step % places
                products = product if by_row else scores
                T.clear(products)
                T.gemm(q_rope, key_rope[now_rope, :, :], products, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
                if packed:
                    # On scores a scale is exact; on values it is rounded with them to bf16.
                    add_scaled(products, part, q_value, value, scales, step % 2)
                    for j, d in T.Parallel(keys, dim):
                        value[0, j, d] = T.cast(raw[step % 2, j, d], "float32") * scales[step % 2, j, d // LATENT_TILE]
                else:
                    T.gemm(q_value, value[now, :, :], products, transpose_B=True, policy=T.GemmWarpPolicy.FullCol)
                if by_row:
                    T.copy(product, product_shared)
                for i, j in T.Parallel(block, keys):
                    scores[i, j] = T.if_then_else(
                        slot[now_slot, j] >= 0,
                        (product_shared if by_row else scores)[i, j] * scale_log2,
                        -T.infinity("float32"),
                    )
                T.copy(maximum, previous)
                T.reduce_max(scores, maximum, dim=1, clear=False, batch=1 if by_row else 2)
                for i in T.Parallel(block):
                    rescale[i] = T.exp2(previous[i] - maximum[i])
                # Summed over the keys of a row once, at the end.
                for i, j in T.Parallel(block, keys):
                    scores[i, j] = T.exp2(scores[i, j] - maximum[i])
                    weights[i, j] = weights[i, j] * rescale[i] + scores[i, j]
                if by_row:
                    T.copy(scores, probability)
                    T.copy(rescale, rescale_shared)
                    for i, d in T.Parallel(block, dim):
                        sums[i, d] = sums[i, d] * rescale_shared[i]
                    T.gemm(probability, value[now, :, :], sums, policy=T.GemmWarpPolicy.FullCol)
                else:
                    # 64 x 64 as the RoPE parts, which have been multiplied: in their place.
                    T.copy(scores, key_rope[now_rope, :, :])
                    for i, d in T.Parallel(block, dim):
                        sums[i, d] = sums[i, d] * rescale[i]
                    T.gemm(key_rope[now_rope, :, :], value[now, :, :], sums, policy=T.GemmWarpPolicy.FullCol)

            if early:
                T.pdl_trigger()
            T.reduce_sum(weights, total, dim=1)
            for i in T.Parallel(block):
                rescale[i] = T.if_then_else(total[i] == 0, T.float32(0), unit / total[i])
            if by_row:
                T.copy(rescale, rescale_shared)
            for i, d in T.Parallel(block, dim):
                out[token, split, first_head + i, d] = sums[i, d] * (rescale_shared if by_row else rescale)[i]
            for i in T.Parallel(block):
                lse[token, split, first_head + i] = T.if_then_else(
                    total[i] == 0, -T.infinity("float32"), (maximum[i] + T.log2(total[i])) / T.float32(_LOG2_E)
                )

    return sparse_attend


def merge_program(heads: int, parts: int, arch: str) -> Any:
    """TileLang function (partial, partial_lse, out, lse): up to `parts` splits combined by their log-sum-exps.

    All splits are read at once. Of many, a block takes a quarter of a head, so that few tokens spread over the device.
    """
    import tilelang.language as T

    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")
    piece = LATENT_DIM if parts <= 8 else LATENT_DIM // 4
    width = T.int32(piece // 128)
    early = launches_early(arch)

    @T.prim_func
    def merge_splits(
        partial: T.Tensor([tokens, splits, heads, LATENT_DIM], "float32"),
        partial_lse: T.Tensor([tokens, splits, heads], "float32"),
        out: T.Tensor([tokens, heads, LATENT_DIM], "bfloat16"),
        lse: T.Tensor([tokens, heads], "float32"),
    ):
        with T.Kernel(tokens, heads, LATENT_DIM // piece, threads=128) as (token, head, part):
            part_lse = T.alloc_fragment([parts], "float32")
            share = T.alloc_fragment([parts], "float32")
            share_shared = T.alloc_shared([parts], "float32")
            values = T.alloc_fragment([parts, piece], "float32")
            merged = T.alloc_fragment([piece], "float32")
            maximum = T.alloc_fragment([1], "float32")
            total = T.alloc_fragment([1], "float32")
            if early:
                T.pdl_sync()
            for s in T.Parallel(parts):
                part_lse[s] = T.if_then_else(s < splits, partial_lse[token, s, head], -T.infinity("float32"))
            T.fill(maximum, _NO_SCORE)
            T.reduce_max(part_lse, maximum, dim=0, clear=False)
            for s in T.Parallel(parts):
                share[s] = T.exp2((part_lse[s] - maximum[0]) * T.float32(_LOG2_E))
            T.reduce_sum(share, total, dim=0)
            T.copy(share, share_shared)
            for s, d in T.Parallel(parts, piece, coalesced_width=width):
                values[s, d] = T.if_then_else(s < splits, partial[token, s, head, part * piece + d], 0)
            for s, d in T.Parallel(parts, piece, coalesced_width=width):
                values[s, d] = values[s, d] * share_shared[s]
            T.reduce_sum(values, merged, dim=0)
            for d in T.Parallel(piece):
                out[token, head, part * piece + d] = T.if_then_else(total[0] == 0, T.float32(0), merged[d] / total[0])
            if part == 0:
                lse[token, head] = T.if_then_else(
                    total[0] == 0, -T.infinity("float32"), maximum[0] + T.log2(total[0]) / T.float32(_LOG2_E)
                )

    return merge_splits
