"""What the adapters to vendors' MLA kernels share: common limits, padding of heads, results into our outputs."""

from __future__ import annotations

import importlib
import math

import torch

from nsa_backend_plugin.layouts import LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no


def can_import(module: str, *names: str) -> Support:
    """Whether a module loads (its CUDA extension may miss a library or a driver) and has the given names."""
    installed = needs_module(module.partition(".")[0])
    if not installed.ok:
        return installed
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # extensions fail with ImportError, OSError, RuntimeError, AssertionError ...
        return no(f"{module} cannot be imported: {error}")
    missing = [name for name in names if not hasattr(loaded, name)]
    return no(f"{module} has no {', '.join(missing)}") if missing else YES


def fits(q: torch.Tensor, kv: torch.Tensor, value_dim: int, page_size: int = 1) -> Support:
    """Limits of every vendor kernel: bf16 queries of DeepSeek's dimensions, a contiguous cache of whole pages."""
    if q.dtype != torch.bfloat16:
        return no(f"q is {q.dtype}: only bfloat16")
    if (value_dim, q.shape[-1]) != (LATENT_DIM, LATENT_DIM + ROPE_DIM):
        return no(f"value_dim {value_dim} of {q.shape[-1]}: only {LATENT_DIM} of {LATENT_DIM + ROPE_DIM}")
    if q.shape[0] == 0:
        return no("no tokens")
    if not kv.is_contiguous():
        return no(f"kv has strides {kv.stride()}: only contiguous")
    if kv.shape[0] == 0 or kv.shape[0] % page_size:
        return no(f"kv has {kv.shape[0]} slots: only whole pages of {page_size}")
    return YES


def pad_heads(q: torch.Tensor, heads: int) -> torch.Tensor:
    """q [T, H, D] with zero heads appended up to `heads`; q itself if it has them."""
    if q.shape[1] == heads:
        return q
    padded = q.new_zeros(q.shape[0], heads, q.shape[2])
    padded[:, : q.shape[1]] = q
    return padded


def write(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    vendor_out: torch.Tensor,
    vendor_lse: torch.Tensor | None,
    empty: torch.Tensor,
    lse_unit: float = 1.0,
) -> None:
    """Copy a vendor's result into ours; rows where `empty` [T] is set get out 0 and lse -inf.

    lse_unit: natural units of the vendor's lse (`BASE_2` for a binary logarithm).
    """
    torch.where(empty[:, None, None], torch.zeros((), dtype=out.dtype, device=out.device), vendor_out, out=out)
    if lse is not None:
        assert vendor_lse is not None
        lse.copy_((vendor_lse * lse_unit).masked_fill(empty[:, None], -math.inf))


BASE_2 = math.log(2)


def compact(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Valid slots of each row moved to its front: (indices [T, K], counts [T] int32). Entries past a count are 0.

    For kernels that read a prefix of a page table. Descending order does it: a missing slot is -1, and attention does
    not depend on the order of keys.
    """
    counts = (indices >= 0).sum(dim=1, dtype=torch.int32)
    return indices.sort(dim=1, descending=True).values.clamp_min(0), counts


def capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured on the tensor's device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def fa3_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    softmax_scale: float,
    page_size: int,
    value_dim: int,
    num_splits: int,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """One query per row of the page table. FA3 takes the RoPE part as q and k, the latent part as qv and v."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    rows = q.shape[0]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    pages = kv.view(-1, page_size, 1, kv.shape[-1])
    result = flash_attn_with_kvcache(
        q=q[..., value_dim:],
        k_cache=pages[..., value_dim:],
        v_cache=pages[..., :value_dim],
        qv=q[..., :value_dim],
        page_table=page_table,
        cache_seqlens=lengths,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        softmax_scale=softmax_scale,
        causal=True,
        num_splits=num_splits,
        return_softmax_lse=lse is not None,
    )
    vendor_out, vendor_lse = (result[0], result[1].T) if lse is not None else (result, None)
    write(out, lse, vendor_out, vendor_lse, lengths == 0)
