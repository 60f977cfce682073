"""AITER's MQA logits with the recorded signatures: arguments checked as the kernels need them, answers in torch.

Source of the contract: ROCm/aiter `pa_mqa_logits.py`, `fp8_mqa_logits.py`; aiter issues 5591 and 5614 for the layouts.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops import mqa_logits

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def deepgemm_fp8_paged_mqa_logits(
    q_fp8,
    kv_cache,
    weights,
    out_logits,
    context_lens,
    kv_indices,
    max_model_len,
    Preshuffle=False,
    KVBlockSize=1,
    ChunkK=256,
    TotalCuCount=None,
    WavePerEU=2,
    VarCtxSchedule=None,
):
    batch, next_n, heads, dim = q_fp8.shape
    assert q_fp8.dtype in FP8
    assert q_fp8.is_contiguous()
    assert dim == 128, "the preshuffle kernel hard-codes it"
    assert kv_cache.dtype == q_fp8.dtype
    assert tuple(kv_cache.shape[1:]) == (KVBlockSize, 1, 132)
    assert kv_cache.is_contiguous()
    assert Preshuffle, "row-major pages of more than one token are read illegally (aiter 5591, 5614)"
    assert KVBlockSize == 64
    assert (ChunkK % KVBlockSize, VarCtxSchedule) == (0, None)
    assert weights.dtype == torch.float32
    assert weights.shape == (batch * next_n, heads)
    assert heads % 16 == 0, "the kernel is compiled for it"
    assert heads & (heads - 1) == 0, "a block of queries"
    assert weights.stride(1) == 1
    assert out_logits.dtype == torch.float32
    assert out_logits.shape == (batch * next_n, max_model_len)
    assert context_lens.dtype == torch.int32
    assert context_lens.shape == (batch,)
    assert kv_indices.dtype == torch.int32
    assert kv_indices.shape[0] == batch
    assert kv_indices.is_contiguous(), "the kernel takes its width for its row stride"
    assert context_lens.is_contiguous()
    assert int(context_lens.max()) <= min(max_model_len, kv_indices.shape[1] * KVBlockSize)
    assert out_logits.stride(1) == 1
    mqa_logits.paged(
        q_fp8,
        kv_cache.view(torch.uint8).view(kv_cache.shape[0], -1),
        weights,
        context_lens,
        kv_indices,
        max_model_len,
        layout="preshuffled",
        page_size=KVBlockSize,
        out=out_logits,
        impl="torch",
    )
    _overshoot(out_logits, context_lens)


def _overshoot(out_logits, context_lens):
    """The real kernel stores up to 190 columns past a row's last token, in whatever lies there (aiter 4580)."""
    storage = out_logits.untyped_storage()
    flat = torch.empty(0).set_(storage, 0, (storage.nbytes() // 4,), (1,))
    for row, length in enumerate(context_lens.tolist()):
        begin = out_logits.storage_offset() + row * out_logits.stride(0) + length
        assert begin + 190 <= flat.numel(), "stores past the end of the allocation"
        flat[begin : begin + 190] = float("nan")


def fp8_mqa_logits(Q, KV, kv_scales, weights, cu_starts, cu_ends, clean_logits=True):
    tokens, heads, dim = Q.shape
    assert Q.dtype in FP8
    assert KV.dtype == Q.dtype
    assert KV.shape[1] == dim == 128
    assert heads & (heads - 1) == 0
    assert Q.is_contiguous()
    assert KV.is_contiguous()
    assert kv_scales.shape == KV.shape[:1]
    assert kv_scales.dtype == weights.dtype == torch.float32
    assert weights.shape == (tokens, heads)
    assert cu_starts.dtype == cu_ends.dtype == torch.int32
    assert cu_starts.shape == cu_ends.shape == (tokens,)
    assert all(t.is_contiguous() for t in (kv_scales, weights, cu_starts, cu_ends))
    assert tokens * -(-KV.shape[0] // 256) * 256 * 4 < 2**31, "does not compile above 2 GiB (aiter 5114)"
    return mqa_logits.ragged(Q, KV, kv_scales, weights, cu_starts, cu_ends, clean=clean_logits, impl="torch")
