"""FlashAttention 3 (sgl_kernel) over latent rows, shared by the adapters of `sparse_mla` and `dense_mla`.

It takes the RoPE part as q and k, the latent part as qv and v. Its schedule depends on the lengths alone. Where one key
takes most of the weight its rows are up to 7.2e-6 (cosine distance, H200, 2026-11-27) from the exact ones.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.layouts import ROPE_DIM
from nsa_backend_plugin.ops._torch.mla import MlaCall, Result
from nsa_backend_plugin.ops._vendor import mla, probe
from nsa_backend_plugin.ops.call import Reason

_MODULE = "sgl_kernel.flash_attn"


def available(arch: str) -> Reason:
    if arch != "sm_90":
        return f"FlashAttention 3 with a latent value part needs sm_90, not {arch}"
    reason = probe.missing(_MODULE, "flash_attn_with_kvcache", "get_scheduler_metadata")
    return reason or probe.missing_parameters(_MODULE, "flash_attn_with_kvcache", "scheduler_metadata", "out")


def decode(
    call: MlaCall, page_table: torch.Tensor, lengths: torch.Tensor, page_size: int, num_splits: int, *, shared: bool
) -> Result:
    """One query per row of the page table. num_splits 0: FA3's own choice.

    shared: whether `lengths` are those of every layer; then the schedule is made once per step.
    """
    from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

    q, value_dim = call.q, call.value_dim
    rows, heads, _ = q.shape
    starts = mla.query_starts(call)
    context = page_table.shape[1] * page_size

    def schedule() -> torch.Tensor:
        return get_scheduler_metadata(
            batch_size=rows,
            max_seqlen_q=1,
            max_seqlen_k=context,
            num_heads=heads,
            num_heads_k=1,
            headdim=ROPE_DIM,
            headdim_v=value_dim,
            cache_seqlens=lengths,
            qkv_dtype=q.dtype,
            cu_seqlens_q=starts,
            page_size=page_size,
            causal=True,
            num_splits=num_splits,
        )

    key = ("fa3", heads, context, page_size, num_splits)
    pages = call.kv.view(-1, page_size, 1, call.kv.shape[-1])
    result = flash_attn_with_kvcache(
        q=q[..., value_dim:],
        k_cache=pages[..., value_dim:],
        v_cache=pages[..., :value_dim],
        qv=q[..., :value_dim],
        page_table=page_table,
        cache_seqlens=lengths,
        cu_seqlens_q=starts,
        max_seqlen_q=1,
        softmax_scale=call.softmax_scale,
        causal=True,
        scheduler_metadata=call.step.once(key, schedule, lengths) if shared else None,
        num_splits=num_splits,
        return_softmax_lse=call.return_lse,
        out=call.out,
    )
    out, lse = (result[0], result[1].T) if call.return_lse else (result, None)
    empty = mla.no_length(call, lengths) if shared else lambda: lengths == 0
    return mla.finish(call, out, lse, empty)
