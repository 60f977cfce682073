"""AITER's MLA entry points with the signatures of ROCm/aiter main, 2026-08-22, computed in torch.

Each checks what the real one demands of its arguments, and would misread silently.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.sparse_mla.reference import softmax_attention

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
PLAN_NAMES = (
    "work_meta_data",
    "work_indptr",
    "work_info_set",
    "reduce_indptr",
    "reduce_final_map",
    "reduce_partial_map",
)


def plan_sizes(batch: int) -> dict[str, tuple[int | tuple[int, ...], torch.dtype]]:
    """Buffer -> (size, dtype) as AITER would answer: not its sizes, but they grow with the batch as its do."""
    sizes = (2, 11, (12 + batch, 8), 13 + batch, (14 + batch, 2), 15 + batch)
    dtypes = (torch.uint64, *[torch.int32] * 5)
    return dict(zip(PLAN_NAMES, zip(sizes, dtypes, strict=True), strict=True))


def _check_plan(buffers, batch):
    for (name, (size, dtype)), tensor in zip(plan_sizes(batch).items(), buffers, strict=True):
        assert tensor.dtype == dtype, name
        assert tuple(tensor.shape) == (size if isinstance(size, tuple) else (size,)), name
        assert tensor.is_contiguous(), name


def _int32(tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert tensor.dtype == torch.int32
    assert tuple(tensor.shape) == shape
    assert tensor.is_contiguous()


def mla_decode_fwd(
    q,
    kv_buffer,
    o,
    qo_indptr,
    kv_indptr,
    kv_indices,
    kv_last_page_lens,
    max_seqlen_q,
    page_size=1,
    nhead_kv=1,
    sm_scale=None,
    logit_cap=0.0,
    num_kv_splits=None,
    num_kv_splits_indptr=None,
    work_meta_data=None,
    work_indptr=None,
    work_info_set=None,
    reduce_indptr=None,
    reduce_final_map=None,
    reduce_partial_map=None,
    q_scale=None,
    kv_scale=None,
    intra_batch_mode=False,
    return_logits=False,
    return_lse=False,
):
    rows, heads, dim = q.shape
    assert q.dtype == torch.bfloat16
    assert q.is_contiguous()
    assert 16 <= heads <= 128
    assert heads % 16 == 0
    assert tuple(kv_buffer.shape[1:]) == (1, 1, dim)
    assert kv_buffer.is_contiguous()
    assert tuple(o.shape) == (rows, heads, 512)
    assert o.dtype == torch.bfloat16
    assert o.is_contiguous()
    assert (page_size, nhead_kv, max_seqlen_q, logit_cap) == (1, 1, 1, 0.0)
    _int32(qo_indptr, (rows + 1,))
    _int32(kv_indptr, (rows + 1,))
    _int32(kv_last_page_lens, (rows,))
    assert kv_indices.dtype == torch.int32
    assert torch.equal(qo_indptr, torch.arange(rows + 1, dtype=torch.int32))
    assert bool((kv_last_page_lens == 1).all())
    used = int(kv_indptr[-1])
    assert used <= kv_indices.numel()
    assert used == 0 or int(kv_indices[:used].min()) >= 0
    plan = (work_meta_data, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map)
    fp8 = kv_buffer.dtype in FP8
    assert fp8 == (kv_scale is not None)
    assert fp8 == (q_scale is not None)
    assert not fp8 or q_scale.shape == kv_scale.shape == ()
    assert not fp8 or q_scale.dtype == kv_scale.dtype == torch.float32
    assert not fp8 or float(q_scale) == 1.0, "a bf16 query has no scale"
    assert (num_kv_splits, num_kv_splits_indptr, intra_batch_mode) == (None, None, False)
    for place, (name, tensor) in enumerate(zip(PLAN_NAMES, plan, strict=True), 1):
        assert fp8 == (tensor is not None)
        assert not fp8 or (tensor == place).all(), f"{name} was not filled by the plan"
    if fp8:
        _check_plan(plan, rows)
    for t in range(rows):
        slots = kv_indices[kv_indptr[t] : kv_indptr[t + 1]].long()
        latent = kv_buffer[slots, 0, 0].float() * (float(kv_scale) if fp8 else 1.0)
        # An empty row is left as it was: the real kernel writes nothing there.
        if len(slots):
            o[t] = softmax_attention(q[t], latent, sm_scale, 512)[0].to(o.dtype)
        else:
            o[t] = float("nan")


def get_mla_metadata_info_v1(
    batch_size,
    max_seqlen_qo,
    num_head_qo,
    q_dtype,
    kv_dtype,
    is_sparse,
    fast_mode=True,
    num_kv_splits=32,
    intra_batch_mode=False,
    max_split_per_batch=-1,
):
    assert max_seqlen_qo == 1
    assert num_head_qo % 16 == 0
    assert q_dtype == torch.bfloat16
    assert kv_dtype in FP8
    assert (is_sparse, fast_mode, intra_batch_mode) == (True, True, False)
    return tuple(plan_sizes(batch_size).values())


def get_mla_metadata_v1(
    seqlens_qo_indptr,
    seqlens_kv_indptr,
    kv_last_page_lens,
    num_heads_per_head_k,
    num_heads_k,
    is_causal,
    work_metadata_ptrs,
    work_info_set,
    work_indptr,
    reduce_indptr,
    reduce_final_map,
    reduce_partial_map,
    page_size=1,
    kv_granularity=16,
    max_seqlen_qo=-1,
    uni_seqlen_qo=-1,
    fast_mode=True,
    topk=-1,
    max_split_per_batch=-1,
    intra_batch_mode=False,
    dtype_q=None,
    dtype_kv=None,
):
    """Fills each buffer with its place in PLAN_NAMES, so that mla_decode_fwd sees a swapped or missing one."""
    assert (page_size, kv_granularity, max_seqlen_qo, uni_seqlen_qo) == (1, 16, 1, 1)
    assert (num_heads_k, is_causal, fast_mode, intra_batch_mode) == (1, False, True, False)
    assert topk == -1, "with a width, a compacted list is taken for a table of that width (sglang 39083)"
    assert max_split_per_batch == 64
    assert num_heads_per_head_k % 16 == 0
    rows = seqlens_qo_indptr.numel() - 1
    _int32(seqlens_qo_indptr, (rows + 1,))
    _int32(seqlens_kv_indptr, (rows + 1,))
    _int32(kv_last_page_lens, (rows,))
    assert dtype_kv in FP8
    assert dtype_q == torch.bfloat16
    plan = (work_metadata_ptrs, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map)
    _check_plan(plan, rows)
    for place, tensor in enumerate(plan, 1):
        tensor.fill_(place)
