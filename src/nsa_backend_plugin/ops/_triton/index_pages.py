"""Pages of the index-K cache inside Triton kernels: `layouts.py`'s offsets, and quantizing rows into their slots."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from nsa_backend_plugin import layouts
from nsa_backend_plugin.ops._triton.quant import scale_from_amax, to_fp8

_DIM = tl.constexpr(layouts.INDEX_DIM)


def _compiled(formula: Callable) -> Any:
    """A formula of layouts.py as a Triton function; the interpreter looks for `tl` among its globals: ours."""
    return triton.jit(FunctionType(formula.__code__, globals(), formula.__name__))


value_offset = _compiled(layouts.index_value_offset)
scale_offset = _compiled(layouts.index_scale_offset)


@triton.jit
def value_offsets(token, PRESHUFFLED: tl.constexpr):
    """Byte offsets [tokens, 128] of the values of a page's tokens."""
    return value_offset(token[:, None], tl.arange(0, _DIM)[None, :], PRESHUFFLED, _DIM)


@triton.jit
def store_rows(
    x,
    slot,
    cache_ptr,
    PAGE_SIZE: tl.constexpr,
    PRESHUFFLED: tl.constexpr,
    UE8M0: tl.constexpr,
    FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
):
    """Quantize rows x [tokens, 128] fp32 and write them into their slots [tokens] int64; negative = skip."""
    scale = scale_from_amax(tl.max(tl.abs(x), axis=1), FP8_MAX, UE8M0)
    value = to_fp8(x, scale[:, None], FP8, FP8_MAX, UE8M0)
    keep = slot >= 0
    token = (slot % PAGE_SIZE).to(tl.int32)
    page_ptr = cache_ptr + (slot // PAGE_SIZE) * (PAGE_SIZE * (_DIM + 4))
    tl.store(page_ptr[:, None] + value_offsets(token, PRESHUFFLED), value, mask=keep[:, None])
    scale_ptr = (page_ptr + scale_offset(token, PAGE_SIZE, _DIM)).to(tl.pointer_type(tl.float32))
    tl.store(scale_ptr, scale, mask=keep)
