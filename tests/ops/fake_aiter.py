"""A stand-in for AITER: checks every argument as the real kernels do, and computes the right answer in torch.

Source of the contracts: ROCm/aiter main of 2026-08-22 (`aiter/ops/cache.py`, `aiter/ops/triton/.../fused_kv_cache.py`).
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from nsa_backend_plugin.ops import index_key_cache
from nsa_backend_plugin.ops._torch.rotary import apply_rope
from nsa_backend_plugin.ops._vendor import aiter_contract

_CALLS = {call.function: call for call in aiter_contract.CALLS}
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def as_declared(function: Callable[..., Any]) -> Callable[..., Any]:
    """A fake that refuses a call unlike that of `aiter_contract.CALLS`, which is what doctor compares with AITER."""
    call = _CALLS[function.__name__]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        assert len(args) == len(call.positional), f"{call.name}: {len(args)} positional arguments"
        assert set(kwargs) <= set(call.keywords), f"{call.name}: {set(kwargs) - set(call.keywords)} not declared"
        return function(*args, **kwargs)

    return run


def _pages(kv_cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    assert kv_cache.dtype in _FP8
    assert kv_cache.dim() == 3
    assert kv_cache.shape[2] == 132
    assert kv_cache.is_contiguous()
    return kv_cache.view(torch.uint8).view(kv_cache.shape[0], -1), kv_cache.shape[1]


def indexer_k_quant_and_cache(k, kv_cache, slot_mapping, quant_block_size, scale_fmt, preshuffle=False):
    cache, page_size = _pages(kv_cache)
    assert k.dim() == 2
    assert k.shape[1] == 128
    assert k.dtype in (torch.bfloat16, torch.float16)
    assert k.is_contiguous()
    assert slot_mapping.dtype == torch.int64
    assert slot_mapping.shape == k.shape[:1]
    assert slot_mapping.is_contiguous()
    assert quant_block_size == 128
    assert scale_fmt in ("ue8m0", "")
    assert isinstance(preshuffle, bool)
    index_key_cache.store(
        k,
        cache,
        slot_mapping,
        layout="preshuffled" if preshuffle else "row_major",
        scale_format=scale_fmt or "fp32",
        page_size=page_size,
        fp8_dtype=kv_cache.dtype,
        impl="torch",
    )


def cp_gather_indexer_k_quant_cache(kv_cache, dst_k, dst_scale, block_table, cu_seq_lens, preshuffle=False):
    cache, page_size = _pages(kv_cache)
    assert dst_k.dtype == kv_cache.dtype
    assert dst_k.shape[1] == 128
    assert dst_k.is_contiguous()
    assert dst_scale.shape == (dst_k.shape[0], 4)
    assert dst_scale.element_size() == 1
    assert block_table.dtype == torch.int32
    assert block_table.is_contiguous()
    assert cu_seq_lens.dtype == torch.int32
    assert cu_seq_lens.shape == (block_table.shape[0] + 1,)
    assert cu_seq_lens[0] == 0
    assert cu_seq_lens[-1] == dst_k.shape[0]
    assert isinstance(preshuffle, bool)
    value, scale = index_key_cache.gather(
        cache,
        block_table,
        cu_seq_lens.diff(),
        layout="preshuffled" if preshuffle else "row_major",
        page_size=page_size,
        total_tokens=dst_k.shape[0],
        fp8_dtype=kv_cache.dtype,
        impl="torch",
    )
    dst_k.copy_(value)
    dst_scale.view(torch.uint8).copy_(scale[:, None].contiguous().view(torch.uint8))


def fused_qk_rope_cat_and_cache_mla(
    q_nope,
    q_pe,
    k_nope,
    k_pe,
    kv_cache,
    slot_mapping,
    pos,
    cos,
    sin,
    k_scale,
    is_neox,
    num_decode_toks_for_zeros=0,
    apply_scale=True,
    q_out=None,
    decode_q_pe_out=None,
    k_pe_out=None,
    q_out_dtype=None,
):
    tokens = k_nope.shape[0]
    assert q_nope.dim() == q_pe.dim() == k_nope.dim() == k_pe.dim() == kv_cache.dim() == 3
    assert k_nope.shape[1] == k_pe.shape[1] == kv_cache.shape[1] == 1
    assert k_nope.shape[2] + k_pe.shape[2] == kv_cache.shape[2]
    assert q_nope.shape[:2] == q_pe.shape[:2]
    assert q_nope.shape[0] == tokens, "tokens past the query's are stored without a rotation"
    assert kv_cache.dtype in (torch.bfloat16, *_FP8)
    assert kv_cache.stride(2) == 1
    assert slot_mapping.shape == (tokens,)
    assert slot_mapping.is_contiguous()
    assert pos.shape == (tokens,)
    assert cos.shape == sin.shape
    assert cos.stride() == sin.stride(), "the kernel uses the strides of cos for both"
    assert cos.shape[1] == k_pe.shape[2] // 2
    assert isinstance(is_neox, bool)
    assert q_nope.shape[2] == k_nope.shape[2]
    assert q_nope.dtype == q_pe.dtype == k_nope.dtype == k_pe.dtype
    if q_out is not None:
        assert q_out.shape == (*q_nope.shape[:2], kv_cache.shape[2])
        assert q_out.stride(2) == 1
        assert q_out.data_ptr() == q_nope.data_ptr(), "the query's first part is rewritten where it lies"
        assert q_out.stride() == q_nope.stride()
    assert not apply_scale or kv_cache.dtype in _FP8
    assert apply_scale == (k_scale is not None)
    if apply_scale:
        assert isinstance(k_scale, torch.Tensor)
        assert k_scale.numel() == 1
        assert k_scale.dtype == torch.float32
    cos_sin = torch.cat([cos, sin], dim=1)[pos.long()]
    rotated = apply_rope(k_pe, cos_sin, is_neox).to(k_pe.dtype)
    keep = slot_mapping >= 0
    if k_pe_out is not None:
        assert k_pe_out.shape == k_pe.shape
        k_pe_out[keep] = rotated[keep]
    row = torch.cat([k_nope, rotated], dim=2).float()
    row = (row / k_scale if apply_scale else row).to(kv_cache.dtype)
    kv_cache.view(torch.uint8)[slot_mapping[keep].long()] = row[keep].view(torch.uint8)
    q = torch.cat([q_nope, apply_rope(q_pe, cos_sin, is_neox).to(q_pe.dtype)], dim=2)
    if q_out is None:
        q_out = torch.empty(q.shape, dtype=q_out_dtype or q.dtype)
    q_out.copy_(q)
    return q_out, None, rotated, None


def install(monkeypatch) -> None:
    """Put the fake where the adapters import AITER from."""
    names = ("aiter", "aiter.ops", "aiter.ops.triton", "aiter.ops.triton.fused_kv_cache")
    modules = {name: types.ModuleType(name) for name in names}
    for function in (indexer_k_quant_and_cache, cp_gather_indexer_k_quant_cache, fused_qk_rope_cat_and_cache_mla):
        setattr(modules[_CALLS[function.__name__].module], function.__name__, as_declared(function))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
