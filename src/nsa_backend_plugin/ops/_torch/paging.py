"""Page tables in torch, shared by the references."""

from __future__ import annotations

import torch


def row_slots(pages: torch.Tensor, length: int, page_size: int) -> torch.Tensor:
    """[length] int64 slots of a sequence's tokens, in position order; pages: its row of a table."""
    position = torch.arange(length, device=pages.device)
    return pages[position // page_size].long() * page_size + position % page_size
