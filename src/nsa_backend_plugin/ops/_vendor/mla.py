"""What the adapters to vendors' MLA kernels share: common limits, padding of heads, finished results."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from nsa_backend_plugin.layouts import LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.ops._torch.mla import MlaCall, Result
from nsa_backend_plugin.ops.call import Reason

#: Natural units of a binary logarithm.
BASE_2 = math.log(2)


def limits(call: MlaCall, page_size: int = 1) -> Reason:
    """Why a vendor's kernel does not take a call: `shape_limits`, and a softmax scale that is not positive.

    They mask scores with -inf and find the maximum before they scale. -inf * 0 is NaN, and a negative scale turns -inf
    into inf and the maximum into the minimum.
    """
    if not call.softmax_scale > 0:
        return f"softmax_scale {call.softmax_scale}: only above 0, masked scores are -inf before they are scaled"
    return shape_limits(call, page_size)


def unquantized_limits(call: MlaCall, page_size: int = 1) -> Reason:
    """`limits`, and rows that are not q's dtype. Vendors' dense kernels over fp8 rows want an fp8 query too."""
    if call.kv.dtype != call.q.dtype:
        return f"kv is {call.kv.dtype} but q is {call.q.dtype}: only the same"
    return limits(call, page_size)


def shape_limits(call: MlaCall, page_size: int = 1) -> Reason:
    """Bf16 queries of DeepSeek's dimensions over a contiguous cache of whole pages, on 16-byte boundaries."""
    q, kv = call.q, call.kv
    if q.dtype != torch.bfloat16:
        return f"q is {q.dtype}: only bfloat16"
    if (call.value_dim, q.shape[-1]) != (LATENT_DIM, LATENT_DIM + ROPE_DIM):
        return f"value_dim {call.value_dim} of {q.shape[-1]}: only {LATENT_DIM} of {LATENT_DIM + ROPE_DIM}"
    if q.shape[0] == 0:
        return "no tokens"
    if not kv.is_contiguous():
        return f"kv has strides {kv.stride()}: only contiguous"
    if kv.shape[0] == 0 or kv.shape[0] % page_size:
        return f"kv has {kv.shape[0]} slots: only whole pages of {page_size}"
    if q.data_ptr() % 16 or kv.data_ptr() % 16 or (call.out is not None and call.out.data_ptr() % 16):
        return "q, kv and out must start on multiples of 16 bytes"
    return None


def pad_heads(q: torch.Tensor, heads: int) -> torch.Tensor:
    """q [T, H, D] with zero heads appended up to `heads`; q itself if it has them."""
    if q.shape[1] == heads:
        return q
    padded = q.new_zeros(q.shape[0], heads, q.shape[2])
    padded[:, : q.shape[1]] = q
    return padded


def finish(
    call: MlaCall,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    empty: Callable[[], torch.Tensor],
    lse_unit: float = 1.0,
) -> Result:
    """The call's result from a vendor's: `out` as it is, or in the caller's `out`.

    out [rows, heads or more, value_dim], lse [rows, heads or more]: written by the vendor, ours to change.
    empty() [rows]: which rows have no keys. They get out 0 and lse -inf, unless the caller promises that there are
    none. lse_unit: natural units of the vendor's lse.
    """
    heads = call.q.shape[1]
    if out.shape[1] != heads:
        out = out[:, :heads]
    without_keys = None if call.rows_have_keys else empty()
    if without_keys is not None:
        out.masked_fill_(without_keys[:, None, None], 0)
    if call.out is not None:
        out = call.out if call.out.data_ptr() == out.data_ptr() else call.out.copy_(out)
    if not call.return_lse:
        return out
    assert lse is not None
    lse = lse[:, :heads] if lse_unit == 1.0 else lse[:, :heads] * lse_unit
    if without_keys is not None:
        lse = lse.masked_fill(without_keys[:, None], -math.inf)
    return out, lse


def no_length(call: MlaCall, lengths: torch.Tensor) -> Callable[[], torch.Tensor]:
    """`empty` of `finish` where lengths say it: made once per step."""
    return lambda: call.step.once("rows without keys", lambda: lengths == 0, lengths)


def query_starts(call: MlaCall) -> torch.Tensor:
    """[rows + 1] int32 of one query per row: made once per step."""
    rows, device = call.q.shape[0], call.q.device
    return call.step.once(
        ("query starts", rows), lambda: torch.arange(rows + 1, dtype=torch.int32, device=device), device=device
    )
