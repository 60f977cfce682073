"""The packed rows of a context as bf16, once for all queries of a call."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._triton.packed_rows import unpack
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.sparse_mla import Attend

#: Rows whose bf16 copy lives for the time of one layer: 288 MiB.
MOST_ROWS = 1 << 18


def declines(call: Attend) -> Reason:
    if call.kind != "packed":
        return f"kv is {call.kind}: only packed rows"
    if call.context is None:
        return "the caller does not say which slots may be selected (context)"
    if not 0 < call.context.shape[0] <= MOST_ROWS:
        return f"a context of {call.context.shape[0]} slots: 1 to {MOST_ROWS}"
    return None


def unpacked(call: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [S, D] bf16 of the context's slots, places [slots] int32: of each slot in the context).

    A row's values are rounded to bf16, which costs a cosine distance of some 1e-5 by itself.
    """
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
