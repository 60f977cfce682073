"""FlashMLA's sparse kernels: decode over packed fp8 rows, and the prefill kernel over bf16 rows.

From sgl_kernel (sglang-kernel 0.4.5) or flash_mla (sgl-flash-mla 1.0.0, whose Hopper kernels are its legacy set).
Heads are padded to 64 or 128, the only counts they take. The tile scheduler's metadata is made per call, on the
device; it depends on (tokens, heads, top-k) alone, so an engine may make it once per batch size.
"""

from __future__ import annotations

from typing import Any

import torch

from nsa_backend_plugin.ops._vendor import mla
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.support import YES, Support, no

_ARCHS = ("sm_90", "sm_100", "sm_103")
_PAGE = 64
_NAMES = ("flash_mla_with_kvcache", "flash_mla_sparse_fwd", "get_mla_metadata")


def available(arch: str) -> Support:
    if arch not in _ARCHS:
        return no(f"FlashMLA needs {', '.join(_ARCHS)}, not {arch}")
    sgl_kernel = mla.can_import("sgl_kernel.flash_mla", *_NAMES)
    flash_mla = mla.can_import("flash_mla", *_NAMES)
    return YES if sgl_kernel.ok or flash_mla.ok else no(f"{sgl_kernel.reason}; {flash_mla.reason}")


def accepts_attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kind: str,
    kv_scale: float | None,
    value_dim: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> Support:
    if kind == "fp8":
        return no("kv is plain fp8: only bf16 and packed rows")
    if kind == "bf16" and kv.dtype != torch.bfloat16:
        return no(f"kv is {kv.dtype}: only bfloat16 and packed rows")
    if indices.shape[1] == 0 or indices.shape[1] % 128:
        return no(f"top-k {indices.shape[1]}: only multiples of 128")
    return mla.fits(q, kv, value_dim, _PAGE if kind == "packed" else 1)


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    *,
    kind: str,
    kv_scale: float | None,
    value_dim: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    heads = q.shape[1]
    padded = mla.pad_heads(q, 64 if heads <= 64 else 128)
    run = _decode_packed if kind == "packed" else _prefill_bf16
    vendor_out, vendor_lse, unit = run(padded, kv, indices, softmax_scale, value_dim)
    mla.write(out, lse, vendor_out[:, :heads], vendor_lse[:, :heads], (indices < 0).all(dim=1), unit)


def _decode_packed(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, softmax_scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    tokens, heads, dim = q.shape
    topk = indices.shape[1]
    arguments: dict[str, Any] = dict(
        q=q.view(tokens, 1, heads, dim),
        k_cache=kv.view(-1, _PAGE, 1, kv.shape[-1]),
        head_dim_v=value_dim,
        softmax_scale=softmax_scale,
        causal=False,
        is_fp8_kvcache=True,
        indices=indices.unsqueeze(1),
    )
    if mla.can_import("sgl_kernel.flash_mla", *_NAMES).ok:
        from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

        lengths = torch.full((tokens,), topk, dtype=torch.int32, device=q.device)
        metadata, splits = get_mla_metadata(lengths, heads, 1, heads, True, topk)
        no_table = torch.empty(tokens, 0, dtype=torch.int32, device=q.device)
        vendor_out, vendor_lse = flash_mla_with_kvcache(
            **arguments,
            block_table=no_table,
            cache_seqlens=lengths,
            tile_scheduler_metadata=metadata,
            num_splits=splits,
        )
    else:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata

        metadata, _ = get_mla_metadata()
        vendor_out, vendor_lse = flash_mla_with_kvcache(
            **arguments,
            block_table=None,
            cache_seqlens=None,
            tile_scheduler_metadata=metadata,
            use_legacy=device_arch(q.device) == "sm_90",
        )
    return vendor_out[:, 0], vendor_lse[:, :, 0], 1.0


def _prefill_bf16(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, softmax_scale: float, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    if mla.can_import("sgl_kernel.flash_mla", *_NAMES).ok:
        from sgl_kernel.flash_mla import flash_mla_sparse_fwd

        vendor_out, _, vendor_lse = flash_mla_sparse_fwd(q, kv, indices.unsqueeze(1), softmax_scale, value_dim)
        return vendor_out, vendor_lse, mla.BASE_2
    from flash_mla import flash_mla_sparse_fwd

    legacy = device_arch(q.device) == "sm_90"
    vendor_out, _, vendor_lse = flash_mla_sparse_fwd(
        q, kv, indices.unsqueeze(1), softmax_scale, value_dim, use_legacy=legacy
    )
    return vendor_out, vendor_lse, 1.0
