"""Torch reference of top-k selection: a stable sort, so ties go to the lowest index."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops.support import YES, Support


def available(arch: str) -> Support:
    return YES


def select(
    logits: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    row_starts: torch.Tensor | None,
    page_table: torch.Tensor | None,
    page_rows: torch.Tensor | None,
    page_size: int,
    deterministic: bool,
    out: torch.Tensor,
) -> None:
    out.fill_(-1)
    for row, length in enumerate(lengths.tolist()):
        start = 0 if row_starts is None else int(row_starts[row])
        candidates = logits[row, start : start + length]
        order = torch.sort(candidates, descending=True, stable=True).indices[:k]
        index = order.sort().values
        if page_table is not None:
            table = page_table[row if page_rows is None else int(page_rows[row])]
            index = table[index // page_size].long() * page_size + index % page_size
        out[row, : index.numel()] = index.int()
