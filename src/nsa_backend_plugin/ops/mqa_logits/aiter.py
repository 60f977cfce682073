"""AITER's MQA logits on ROCm: the Gluon kernel for preshuffled pages of 64, and the Triton kernel for prefill.

Checked against fakes, not run on AMD.
"""

from __future__ import annotations

import os

import torch

from nsa_backend_plugin.ops.arch import is_rocm
from nsa_backend_plugin.ops.mqa_logits import finish, new_logits
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no

_PAGE_SIZE = 64


def available(arch: str) -> Support:
    if not is_rocm(arch):
        return no(f"AITER needs a ROCm GPU, not {arch}")
    return needs_module("aiter")


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
    if layout != "preshuffled" or page_size != _PAGE_SIZE:
        # With row-major pages of 64 the kernel reads illegally or returns wrong logits (aiter 5591, 5614).
        return no(f"layout {layout}, page size {page_size}: preshuffled pages of {_PAGE_SIZE} only")
    if q.shape[1] != 1:
        return no(f"next_n {q.shape[1]}: 1 only")
    return _gluon()


def _gluon() -> Support:
    """AITER reads pages of more than one token in its Gluon kernel only."""
    import triton

    if os.environ.get("AITER_ENABLE_AOT_GLUON_PA_MQA_LOGITS", "0") == "1":
        return YES
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 5):
        return YES
    return no(f"Triton {triton.__version__}: its Gluon kernel needs 3.5, or AITER_ENABLE_AOT_GLUON_PA_MQA_LOGITS=1")


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
    from aiter.ops.triton.pa_mqa_logits import deepgemm_fp8_paged_mqa_logits

    logits = new_logits(out, q.shape[0], max_context_len, q.device)
    lengths = context_lens.reshape(-1)
    deepgemm_fp8_paged_mqa_logits(
        q,
        cache.view(q.dtype).view(cache.shape[0], page_size, 1, -1),
        weights,
        logits,
        lengths,
        block_table,
        max_context_len,
        Preshuffle=True,
        KVBlockSize=page_size,
    )
    return finish(logits, None, clean, None, lengths)


def accepts_ragged(q: torch.Tensor, *_: object, **__: object) -> Support:
    heads = q.shape[1]
    return YES if heads & (heads - 1) == 0 else no(f"{heads} heads: a power of two only")


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
    from aiter.ops.triton.fp8_mqa_logits import fp8_mqa_logits

    logits = fp8_mqa_logits(q, k, k_scale, weights, row_start, row_end, clean_logits=False)
    return finish(logits, out, clean, row_start, row_end)
