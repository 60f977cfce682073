"""FlashMLA and FlashAttention-3 as an engine calls them: schedules made once, outside the timing, no fixing-up after.

The adapters under `ops/` make FlashMLA's schedule in every call, and for FA3 sort missing slots to the end. Both are
part of what the registry would run, but not of what these libraries can do.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from nsa_backend_plugin.ops.mla_vendor import pad_heads

from benchmarks.workloads.base import HEAD_DIM, ROW_BYTES, SOFTMAX_SCALE, VALUE_DIM, Problem, int32

Call = Callable[[Any], Any]
PAGE = 64


def _padded_heads(heads: int) -> int:
    return 64 if heads <= 64 else 128


def flash_mla_packed(problem: Problem) -> Call:
    """FlashMLA's sparse decode over packed fp8 rows; pads the heads, as it must."""
    from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

    tokens, heads, topk = (problem.extra[k] for k in ("tokens", "heads", "topk"))
    pages = problem.extra["pool"].view(-1, PAGE, 1, ROW_BYTES["packed"])
    lengths = int32([topk] * tokens, pages.device)
    table = torch.empty(tokens, 0, dtype=torch.int32, device=pages.device)
    width = _padded_heads(heads)
    metadata, splits = get_mla_metadata(lengths, width, 1, width, True, topk)

    def call(item: Any) -> torch.Tensor:
        q, indices = item
        out, _ = flash_mla_with_kvcache(
            q=pad_heads(q, width)[:, None],
            k_cache=pages,
            block_table=table,
            cache_seqlens=lengths,
            head_dim_v=VALUE_DIM,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
            softmax_scale=SOFTMAX_SCALE,
            indices=indices[:, None],
            is_fp8_kvcache=True,
        )
        return out[:, 0, :heads]

    return call


def flash_mla_sparse(problem: Problem) -> Call:
    """FlashMLA's sparse prefill kernel over bf16 rows; pads the heads, as it must."""
    from sgl_kernel.flash_mla import flash_mla_sparse_fwd

    pool, heads = problem.extra["pool"], problem.extra["heads"]

    def call(item: Any) -> torch.Tensor:
        q, indices = item
        padded = pad_heads(q, _padded_heads(heads))
        return flash_mla_sparse_fwd(padded, pool, indices[:, None], SOFTMAX_SCALE, VALUE_DIM)[0][:, :heads]

    return call


def flash_mla_planned(problem: Problem) -> Call:
    """Sparse attention through the FlashMLA kernel of the cache's format."""
    packed = problem.extra["pool"].dtype == torch.uint8
    return flash_mla_packed(problem) if packed else flash_mla_sparse(problem)


def flash_mla_dense(problem: Problem) -> Call:
    """FlashMLA's dense decode over pages of 64 tokens."""
    from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

    lens, heads = problem.extra["seq_lens"], problem.extra["heads"]
    pages = problem.extra["pool"].view(-1, PAGE, 1, HEAD_DIM)
    metadata, splits = get_mla_metadata(lens, heads, 1, is_fp8_kvcache=False)

    def call(item: Any) -> torch.Tensor:
        q, table = item
        out, _ = flash_mla_with_kvcache(
            q=q[:, None],
            k_cache=pages,
            block_table=table,
            cache_seqlens=lens,
            head_dim_v=VALUE_DIM,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
            softmax_scale=SOFTMAX_SCALE,
            causal=True,
        )
        return out[:, 0]

    return call


def fa3_sparse(problem: Problem) -> Call:
    """FA3 with the selected slots as a page table of page size 1; every slot is given, so nothing is sorted."""
    tokens, topk = problem.extra["tokens"], problem.extra["topk"]
    return _fa3(problem.extra["pool"], [topk] * tokens, 1)


def fa3_dense(problem: Problem) -> Call:
    """FA3 over the paged latent cache."""
    return _fa3(problem.extra["pool"], problem.extra["lengths"], problem.extra["page_size"])


def _fa3(pool: torch.Tensor, lengths: list[int], page: int) -> Call:
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    device = pool.device
    rope = pool[..., VALUE_DIM:].view(-1, page, 1, HEAD_DIM - VALUE_DIM)
    latent = pool[..., :VALUE_DIM].view(-1, page, 1, VALUE_DIM)
    lens = int32(lengths, device)
    starts = int32(list(range(len(lengths) + 1)), device)
    key_starts = int32([0, *accumulate(lengths)], device)

    def call(item: Any) -> torch.Tensor:
        q, table = item
        return flash_attn_with_kvcache(
            q=q[..., VALUE_DIM:],
            k_cache=rope,
            v_cache=latent,
            qv=q[..., :VALUE_DIM],
            page_table=table,
            cache_seqlens=lens,
            cu_seqlens_q=starts,
            cu_seqlens_k_new=key_starts,
            max_seqlen_q=1,
            softmax_scale=SOFTMAX_SCALE,
            causal=True,
            num_splits=0,
        )

    return call


def flashinfer_dense(problem: Problem) -> Call:
    """FlashInfer's MLA decode, planned once, q in its parts; every call copies its page list into the planned one."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    pool, lengths, heads, page = (problem.extra[k] for k in ("pool", "lengths", "heads", "page_size"))
    device, rows = pool.device, len(lengths)
    counts = [-(-n // page) for n in lengths]
    lists = {id(t): torch.cat([t[i, :n] for i, n in enumerate(counts)]) for _, t in problem.inputs}
    parts = {id(q): (q[..., :VALUE_DIM].contiguous(), q[..., VALUE_DIM:].contiguous()) for q, _ in problem.inputs}
    starts = int32(list(range(rows + 1)), device)
    page_starts = int32([0, *accumulate(counts)], device)
    listed = torch.empty(sum(counts), dtype=torch.int32, device=device)
    wrapper = BatchMLAPagedAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=device),
        use_cuda_graph=True,
        qo_indptr=starts.clone(),
        kv_indptr=page_starts.clone(),
        kv_indices=listed,
        kv_len_arr=problem.extra["seq_lens"].clone(),
        backend="fa3" if torch.cuda.get_device_capability(device)[0] == 9 else "fa2",
    )
    wrapper.plan(
        starts.cpu(),
        page_starts.cpu(),
        lists[id(problem.inputs[0][1])],
        problem.extra["seq_lens"].cpu(),
        heads,
        VALUE_DIM,
        HEAD_DIM - VALUE_DIM,
        page,
        True,
        SOFTMAX_SCALE,
        torch.bfloat16,
        torch.bfloat16,
    )
    pages = pool.view(-1, page, HEAD_DIM)
    latent, rope = pages[..., :VALUE_DIM], pages[..., VALUE_DIM:]

    def call(item: Any) -> torch.Tensor:
        q, table = item
        listed.copy_(lists[id(table)])
        return wrapper.run(*parts[id(q)], latent, rope)

    return call


def sglang_tilelang(problem: Problem) -> Call:
    """SGLang's TileLang kernel over bf16 rows, written for prefill and used by it for decode too."""
    from sglang.kernels.ops.attention.dsa.tilelang_kernel import tilelang_sparse_fwd

    pool = problem.extra["pool"]

    def call(item: Any) -> torch.Tensor:
        q, indices = item
        return tilelang_sparse_fwd(q, pool, indices[:, None], SOFTMAX_SCALE, VALUE_DIM).view(*q.shape[:2], VALUE_DIM)

    return call
