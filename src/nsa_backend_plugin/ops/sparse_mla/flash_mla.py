"""FlashMLA's sparse kernels: decode over packed fp8 rows, and the prefill kernel over bf16 rows.

Heads are padded to 64 or 128, the only counts they take. The decode widens rows to bf16 before it multiplies. On
FlashMLA's own test data (4 tokens, 16 heads, 2046 of 2048 indices) that was measured 6.9e-6 (cosine distance) from
the exact result of the same rows, where the other implementations stay below 5e-6: the tests give it a bar of its own.
Its log-sum-exp is not given: beside such outputs that of sgl-flash-mla 1.0.0 (SGLang 0.5.23, H200, 2026-11-27) was off
by up to 9e-3, and what merges results by it would weigh them by 0.9% too much.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._vendor import flash_mla, mla
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

_ARCHS = ("sm_90", "sm_100", "sm_103")


def available(arch: str) -> Reason:
    return flash_mla.missing() if arch in _ARCHS else f"FlashMLA needs {', '.join(_ARCHS)}, not {arch}"


def declines_attend(call: Attend) -> Reason:
    if call.kind == "packed" and call.return_lse:
        return "the log-sum-exp of its decode over packed rows is up to 9e-3 off"
    return limits(call)


def limits(call: Attend) -> Reason:
    """What neither kernel takes."""
    if call.kind == "fp8":
        return "kv is plain fp8: only bf16 and packed rows"
    if call.kind == "bf16" and call.kv.dtype != torch.bfloat16:
        return f"kv is {call.kv.dtype}: only bfloat16 and packed rows"
    topk = call.indices.shape[1]
    if topk == 0 or topk % 128:
        return f"top-k {topk}: only multiples of 128"
    return mla.limits(call, flash_mla.PAGE if call.kind == "packed" else 1)


def attend(call: Attend) -> Result:
    heads, indices, lengths = call.q.shape[1], call.indices, call.lengths
    q = mla.pad_heads(call.q, 64 if heads <= 64 else 128)
    empty = (lambda: (indices < 0).all(dim=1)) if lengths is None else mla.no_length(call, lengths)
    if call.kind != "packed":
        return mla.finish(call, *flash_mla.prefill(call, q, indices, lengths), empty, mla.BASE_2)
    # Its Hopper kernel takes no topk_length: it reads every index and skips those that are -1.
    out, lse = flash_mla.decode(
        call,
        q,
        None,
        (indices.shape[1],),
        block_table=None,
        cache_seqlens=None,
        is_fp8_kvcache=True,
        indices=indices.unsqueeze(1),
    )
    return mla.finish(call, out, lse, empty)
