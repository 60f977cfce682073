"""DeepGEMM's MQA logits (sgl-deep-gemm): row-major pages of 64 on Hopper and Blackwell."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.mqa_logits import finish
from nsa_backend_plugin.ops.mqa_logits.reference import row_lengths
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no

_HEADS = (32, 64)
_PAGE_SIZE = 64


def available(arch: str) -> Support:
    if arch not in ("sm_90", "sm_100", "sm_103"):
        return no(f"DeepGEMM's MQA logits need sm_90 or sm_100, not {arch}")
    return needs_module("deep_gemm")


def accepts_paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    *,
    layout: str,
    page_size: int,
    clean: bool,
    out: torch.Tensor | None,
) -> Support:
    _, next_n, heads, _ = q.shape
    if layout != "row_major":
        return no(f"layout {layout}: reads row_major only")
    if page_size != _PAGE_SIZE:
        return no(f"page size {page_size}: {_PAGE_SIZE} only")
    if next_n not in (1, 2):
        return no(f"next_n {next_n}: 1 or 2 only")
    if next_n > 1 and context_lens.dim() == 2:
        return no("context_lens of each query: it stops where the last query of a request does, another may see more")
    if block_table.shape[1] and block_table.stride(1) != 1:
        return no("block_table has a stride in its last dimension")
    return _accepts(q, heads)


def accepts_ragged(q: torch.Tensor, *args: object, **kwargs: object) -> Support:
    return _accepts(q, q.shape[1])


def _accepts(q: torch.Tensor, heads: int) -> Support:
    if heads not in _HEADS:
        return no(f"{heads} heads: {' or '.join(map(str, _HEADS))} only")
    if q.dtype != torch.float8_e4m3fn:
        return no(f"q is {q.dtype}: e4m3fn only")
    return YES if q.shape[0] else no("an empty batch")


def paged(
    q: torch.Tensor,
    cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    *,
    layout: str,
    page_size: int,
    clean: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    import deep_gemm

    next_n = q.shape[1]
    # Two-dimensional lengths: with one-dimensional ones this release can deadlock (SGLang's _to_2d_context_lens).
    lengths = row_lengths(context_lens, next_n).contiguous()
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, page_size, deep_gemm.get_num_sms())
    logits = deep_gemm.fp8_paged_mqa_logits(
        q,
        cache.view(cache.shape[0], page_size, 1, -1),
        weights.contiguous(),
        lengths,
        block_table,
        schedule,
        max_context_len,
        clean_logits=False,
    )
    return finish(logits[:, :max_context_len], out, clean, None, lengths.view(-1))


def ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_start: torch.Tensor,
    row_end: torch.Tensor,
    *,
    clean: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    import deep_gemm

    start, end = row_start.contiguous(), row_end.contiguous()
    keys = (k, k_scale.contiguous())
    logits = deep_gemm.fp8_mqa_logits(q, keys, weights.contiguous(), start, end, clean_logits=False)
    return finish(logits[:, : k.shape[0]], out, clean, start, end)
