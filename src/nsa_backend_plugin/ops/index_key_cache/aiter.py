"""AITER's kernels of the index-K cache (ROCm): quantize and store, gather. Checked against fakes, not run on AMD."""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import INDEX_DIM
from nsa_backend_plugin.ops.arch import fp8_dtype as device_fp8_dtype
from nsa_backend_plugin.ops.arch import is_rocm
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no


def available(arch: str) -> Support:
    return needs_module("aiter") if is_rocm(arch) else no("AITER is ROCm only")


def _accepts(device: torch.device, fp8_dtype: torch.dtype) -> Support:
    native = device_fp8_dtype(device)
    return YES if fp8_dtype == native else no(f"writes and reads {native}, not {fp8_dtype}")


def accepts_store(key: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, *, fp8_dtype, **_) -> Support:
    if key.dtype == torch.float32:
        return no("takes bf16 and fp16 keys, not fp32")
    return _accepts(cache.device, fp8_dtype)


def accepts_gather(cache: torch.Tensor, block_table, seq_lens, *, fp8_dtype: torch.dtype, **_) -> Support:
    return _accepts(cache.device, fp8_dtype)


def store(
    key: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layout: str,
    scale_format: str,
    page_size: int,
    fp8_dtype: torch.dtype,
) -> None:
    import aiter

    if key.shape[0] == 0:
        return
    aiter.indexer_k_quant_and_cache(
        key.contiguous(),
        cache.view(-1, page_size, INDEX_DIM + 4).view(fp8_dtype),
        slots.long().contiguous(),
        INDEX_DIM,  # one scale per token
        "ue8m0" if scale_format == "ue8m0" else "",
        preshuffle=layout == "preshuffled",
    )


def gather(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layout: str,
    page_size: int,
    total_tokens: int,
    fp8_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    import aiter

    value = torch.empty(total_tokens, INDEX_DIM, dtype=fp8_dtype, device=cache.device)
    scale = torch.empty(total_tokens, 4, dtype=torch.uint8, device=cache.device)
    if total_tokens:
        ends = torch.nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        aiter.cp_gather_indexer_k_quant_cache(
            cache.view(-1, page_size, INDEX_DIM + 4).view(fp8_dtype),
            value,
            scale,
            block_table.contiguous(),
            ends,
            preshuffle=layout == "preshuffled",
        )
    return value, scale.view(torch.float32).squeeze(-1)
