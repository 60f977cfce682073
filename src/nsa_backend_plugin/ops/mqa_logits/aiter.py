"""AITER's MQA logits on ROCm: the Gluon kernel for preshuffled pages of 64, and the Triton kernel for prefill.

Both read fp8 of the GPU's own flavour. What they get wrong without a word is declined or worked around here, with the
report's number. Checked against fakes, not run on AMD.
"""

from __future__ import annotations

import os

import torch

from nsa_backend_plugin.ops.arch import fp8_dtype, is_rocm
from nsa_backend_plugin.ops.mqa_logits import ROW_GUARD, finish
from nsa_backend_plugin.ops.support import YES, Support, needs_module, no

_PAGE_SIZE = 64
_INT32_BYTES = 1 << 31


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
    if cache.numel() >= _INT32_BYTES:
        # Its offset of a page has 32 bits: logits of pages behind that are 0 (vllm 52109).
        return no(f"cache of {cache.numel()} bytes: less than 2 GiB only")
    native = _native(q)
    return _gluon() if native.ok else native


def _native(q: torch.Tensor) -> Support:
    native = fp8_dtype(q.device)
    return YES if q.dtype == native else no(f"reads {native}, not {q.dtype}")


def _gluon() -> Support:
    """AITER reads pages of more than one token in its Gluon kernel only, compiled by Triton or ahead of time."""
    import triton

    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if version >= (3, 5):
        return YES
    if os.environ.get("AITER_ENABLE_AOT_GLUON_PA_MQA_LOGITS", "0") == "1" and version < (3, 4):
        return YES  # Triton 3.4 launches with another ABI than the compiled kernel has, which AITER asserts
    return no(
        f"Triton {triton.__version__}: its Gluon kernel needs 3.5, or before 3.4 AITER_ENABLE_AOT_GLUON_PA_MQA_LOGITS=1"
    )


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

    logits = out
    if logits is None or not _guarded(logits):
        # Its stores pass the end of a row's last page by up to 190 columns, into the next row's (aiter 4580).
        logits = torch.empty(q.shape[0], max_context_len + ROW_GUARD, dtype=torch.float32, device=q.device)
        logits = logits[:, :max_context_len]
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
    return finish(logits, None if logits is out else out, clean, None, lengths)


def _guarded(out: torch.Tensor) -> bool:
    """Whether ROW_GUARD columns behind each row are nobody's, the last row's included."""
    rows, columns = out.shape
    behind = out.untyped_storage().nbytes() // out.element_size() - out.storage_offset()
    return out.stride(0) >= columns + ROW_GUARD and behind >= (rows - 1) * out.stride(0) + columns + ROW_GUARD


def accepts_ragged(q: torch.Tensor, k: torch.Tensor, *_: object, **__: object) -> Support:
    tokens, heads, _dim = q.shape
    if heads & (heads - 1):
        return no(f"{heads} heads: a power of two only")
    aligned = -(-k.shape[0] // 256) * 256
    if tokens * aligned * 4 >= _INT32_BYTES:
        return no(f"logits [{tokens}, {k.shape[0]}]: less than 2 GiB only, above it does not compile (aiter 5114)")
    return _native(q)


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
