"""Torch reference of top-k selection: a stable sort, so ties go to the lowest index."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.topk import Select


def available(arch: str) -> Reason:
    return None


def select(call: Select) -> torch.Tensor:
    out, page_size = call.out.fill_(-1), call.page_size
    for row, length in enumerate(call.lengths.tolist()):
        start = 0 if call.row_starts is None else int(call.row_starts[row])
        candidates = call.logits[row, start : start + length]
        order = torch.sort(candidates, descending=True, stable=True).indices[: call.k]
        index = order.sort().values
        if call.page_table is not None:
            table = call.page_table[row if call.page_rows is None else int(call.page_rows[row])]
            index = table[index // page_size].long() * page_size + index % page_size
        out[row, : index.numel()] = index.int()
    return out
