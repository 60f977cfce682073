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
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend, _context, flash_mla

_BLOCK = 1024

available = flash_mla.available


def declines_attend(call: Attend) -> Reason:
    reason = _context.declines(call)
    # Its kernel over bf16 rows runs, which gives an exact log-sum-exp.
    return flash_mla.declines_attend(replace(call, return_lse=False)) if reason is None else reason


@triton.jit
def _places_kernel(indices, places, out, count, BLOCK: tl.constexpr):
    """out[i] = places[indices[i]], or -1."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + i, mask=i < count, other=-1)
    tl.store(out + i, tl.load(places + index, mask=index >= 0, other=-1), mask=i < count)


def attend(call: Attend) -> Result:
    rows, places = _context.unpacked(call)
    indices = torch.empty_like(call.indices)
    count = indices.numel()
    launch(_places_kernel, (triton.cdiv(count, _BLOCK),), call.indices, places, indices, count, BLOCK=_BLOCK)
    return flash_mla.attend(replace(call, kv=rows[:, None], kind="bf16", indices=indices))
