"""FlashInfer's paged MLA decode (fa3 on Hopper, fa2 elsewhere), bf16, any page size and head count.

Its `plan` reads the lengths on the host: every call waits for the device. Good for comparison; inside a CUDA graph it
declines. An engine that uses FlashInfer plans once per step, outside the graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from nsa_backend_plugin.layouts import ROPE_DIM
from nsa_backend_plugin.ops._vendor import mla
from nsa_backend_plugin.ops.arch import device_arch, is_cuda
from nsa_backend_plugin.ops.support import Support, no

_WORKSPACE_BYTES = 128 << 20  # what its documentation asks for


def available(arch: str) -> Support:
    if not is_cuda(arch):
        return no(f"FlashInfer needs an NVIDIA GPU, not {arch}")
    if int(arch[3:]) < 80:
        return no(f"FlashInfer needs sm_80 or newer, not {arch}")
    return mla.can_import("flashinfer.mla", "BatchMLAPagedAttentionWrapper")


def accepts_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    page_size: int,
    value_dim: int,
    num_kv_splits: int | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> Support:
    if mla.capturing(q):
        return no("plan reads the lengths on the host, which a CUDA graph cannot capture")
    if num_kv_splits is not None:
        return no("num_kv_splits is given: its plan chooses the splits")
    return mla.fits(q, kv, value_dim, page_size)


def decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    softmax_scale: float,
    *,
    page_size: int,
    value_dim: int,
    num_kv_splits: int | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> None:
    batch, heads, dim = q.shape
    lengths = seq_lens.cpu()
    page_counts = (lengths + page_size - 1) // page_size
    page_starts = torch.zeros(batch + 1, dtype=torch.int32)
    page_starts[1:] = page_counts.cumsum(0)
    used = torch.arange(block_table.shape[1])[None, :] < page_counts[:, None]
    wrapper = _wrapper(q.device, "fa3" if device_arch(q.device) == "sm_90" else "fa2")
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32),
        page_starts,
        block_table[used.to(q.device)],
        lengths,
        heads,
        value_dim,
        ROPE_DIM,
        page_size,
        True,
        softmax_scale,
        q.dtype,
        kv.dtype,
    )
    pages = kv.view(-1, page_size, dim)
    result = wrapper.run(
        q[..., :value_dim].contiguous(),
        q[..., value_dim:].contiguous(),
        pages[..., :value_dim],
        pages[..., value_dim:],
        return_lse=lse is not None,
    )
    vendor_out, vendor_lse = result if lse is not None else (result, None)
    mla.write(out, lse, vendor_out, vendor_lse, seq_lens == 0, mla.BASE_2)


@functools.cache
def _wrapper(device: torch.device, backend: str) -> Any:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    return BatchMLAPagedAttentionWrapper(
        torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device), backend=backend
    )
