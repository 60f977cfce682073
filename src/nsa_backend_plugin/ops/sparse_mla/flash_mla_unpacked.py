"""FlashMLA's sparse prefill kernel over packed rows: those of the context are unpacked to bf16 once for all queries.

Its decode kernel, which reads packed rows itself, spends more on widening every row for every query than on
multiplying (its authors give 410 TFLOP/s on an H800, and 640 for this one). With many queries over one context that
is paid once per layer here. The copy rounds a row's values to bf16 as the decode kernel does, which costs a cosine
distance of some 1e-5 by itself. Needs `context`, the slots that may be selected.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from nsa_backend_plugin.ops._torch.mla import Result
from nsa_backend_plugin.ops._triton.launch import launch
from nsa_backend_plugin.ops._triton.packed_rows import unpack
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend, flash_mla

_BLOCK = 1024
#: Rows whose bf16 copy lives for the time of one layer: 288 MiB.
MOST_ROWS = 1 << 18

available = flash_mla.available


def declines_attend(call: Attend) -> Reason:
    if call.kind != "packed":
        return f"kv is {call.kind}: only packed rows"
    if call.context is None:
        return "the caller does not say which slots may be selected (context)"
    if not 0 < call.context.shape[0] <= MOST_ROWS:
        return f"a context of {call.context.shape[0]} slots: 1 to {MOST_ROWS}"
    return flash_mla.limits(call)


@triton.jit
def _places_kernel(indices, places, out, count, BLOCK: tl.constexpr):
    """out[i] = places[indices[i]], or -1."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + i, mask=i < count, other=-1)
    tl.store(out + i, tl.load(places + index, mask=index >= 0, other=-1), mask=i < count)


def _unpacked(call: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [S, D] bf16 of the context's slots, places [slots] int32: of each slot in the context)."""
    context, kv = call.context, call.kv
    assert context is not None
    rows = context.shape[0]

    def number() -> torch.Tensor:
        places = torch.empty(kv.shape[0], dtype=torch.int32, device=kv.device)
        places[context.long()] = torch.arange(rows, dtype=torch.int32, device=kv.device)
        return places

    places = call.step.once(("places of slots", kv.shape[0]), number, context)
    out = torch.empty(rows, call.q.shape[2], dtype=torch.bfloat16, device=kv.device)
    unpack(kv.view(torch.uint8).view(kv.shape[0], -1), out, call.value_dim, slots=context)
    return out, places


def attend(call: Attend) -> Result:
    rows, places = _unpacked(call)
    indices = torch.empty_like(call.indices)
    count = indices.numel()
    launch(_places_kernel, (triton.cdiv(count, _BLOCK),), call.indices, places, indices, count, BLOCK=_BLOCK)
    return flash_mla.attend(replace(call, kv=rows[:, None], kind="bf16", indices=indices))
