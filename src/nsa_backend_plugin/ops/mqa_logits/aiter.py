"""AITER's MQA logits on ROCm: the Gluon kernel for preshuffled pages of 64, and the Triton kernel for prefill.

Both read fp8 of the GPU's own flavour. What they get wrong without a word is declined or worked around here, with the
report's number. Checked against fakes, not run on AMD.
"""

from __future__ import annotations

import functools
import os

import torch

from nsa_backend_plugin.ops._vendor import probe
from nsa_backend_plugin.ops.arch import arch_fp8_dtype, is_rocm
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.mqa_logits import ROW_GUARD, Paged, Ragged

_PAGE_SIZE = 64
_INT32_BYTES = 1 << 31


def available(arch: str) -> Reason:
    if not is_rocm(arch):
        return f"AITER needs a ROCm GPU, not {arch}"
    return probe.missing("aiter.ops.triton.pa_mqa_logits", "deepgemm_fp8_paged_mqa_logits") or probe.missing(
        "aiter.ops.triton.fp8_mqa_logits", "fp8_mqa_logits"
    )


def declines_paged(call: Paged) -> Reason:
    if call.layout != "preshuffled" or call.page_size != _PAGE_SIZE:
        # With row-major pages of 64 the kernel reads illegally or returns wrong logits (aiter 5591, 5614).
        return f"layout {call.layout}, page size {call.page_size}: preshuffled pages of {_PAGE_SIZE} only"
    _, next_n, heads, _ = call.q.shape
    if next_n != 1:
        return f"next_n {next_n}: 1 only"
    if heads < 16 or heads & (heads - 1):
        return f"{heads} heads: a power of two from 16 on only"
    if call.cache.numel() >= _INT32_BYTES:
        # Its offset of a page has 32 bits: logits of pages behind that are 0 (vllm 52109).
        return f"cache of {call.cache.numel()} bytes: less than 2 GiB only"
    if call.q.data_ptr() % 16 or call.weights.data_ptr() % 16:
        return "q or weights do not start at a 16-byte boundary"  # which the kernel is compiled for
    return _declines_flavour(call) or _gluon()


def _declines_flavour(call: Paged | Ragged) -> Reason:
    native = arch_fp8_dtype(call.arch)
    return None if call.q.dtype == native else f"reads {native}, not {call.q.dtype}"


@functools.cache
def _gluon() -> Reason:
    """AITER reads pages of more than one token in its Gluon kernel only, compiled by Triton or ahead of time."""
    import triton

    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if version >= (3, 5):
        return None
    if os.environ.get("AITER_ENABLE_AOT_GLUON_PA_MQA_LOGITS", "0") == "1" and version < (3, 4):
        return None  # Triton 3.4 launches with another ABI than the compiled kernel has, which AITER asserts
    return (
        f"Triton {triton.__version__}: its Gluon kernel needs 3.5, or before 3.4 AITER_ENABLE_AOT_GLUON_PA_MQA_LOGITS=1"
    )


def paged(call: Paged) -> torch.Tensor:
    from aiter.ops.triton.pa_mqa_logits import deepgemm_fp8_paged_mqa_logits

    rows, columns = call.shape
    logits = call.out
    if logits is None or not _guarded(logits):
        # Its stores pass the end of a row's last page by up to 190 columns, into the next row's (aiter 4580).
        logits = torch.empty(rows, columns + ROW_GUARD, dtype=torch.float32, device=call.q.device)[:, :columns]
    lengths = call.context_lens.reshape(-1).contiguous()
    deepgemm_fp8_paged_mqa_logits(
        call.q,
        call.cache.view(call.q.dtype).view(call.cache.shape[0], _PAGE_SIZE, 1, -1),
        call.weights.contiguous(),
        logits,
        lengths,
        call.block_table.contiguous(),  # the kernel takes its width for its row stride
        columns,
        Preshuffle=True,
        KVBlockSize=_PAGE_SIZE,
    )
    return call.finish(logits, None, lengths)


def _guarded(out: torch.Tensor) -> bool:
    """Whether ROW_GUARD columns behind each row are nobody's, the last row's included."""
    rows, columns = out.shape
    behind = out.untyped_storage().nbytes() // out.element_size() - out.storage_offset()
    return out.stride(0) >= columns + ROW_GUARD and behind >= (rows - 1) * out.stride(0) + columns + ROW_GUARD


def declines_ragged(call: Ragged) -> Reason:
    tokens, heads, _ = call.q.shape
    keys = call.k.shape[0]
    if heads & (heads - 1):
        return f"{heads} heads: a power of two only"
    aligned = -(-keys // 256) * 256
    if tokens * aligned * 4 >= _INT32_BYTES:
        return f"logits [{tokens}, {keys}]: less than 2 GiB only, above it does not compile (aiter 5114)"
    return _declines_flavour(call)


def ragged(call: Ragged) -> torch.Tensor:
    from aiter.ops.triton.fp8_mqa_logits import fp8_mqa_logits

    start, end = call.row_start.contiguous(), call.row_end.contiguous()
    logits = fp8_mqa_logits(
        call.q, call.k, call.k_scale.contiguous(), call.weights.contiguous(), start, end, clean_logits=False
    )
    return call.finish(logits, start, end)
