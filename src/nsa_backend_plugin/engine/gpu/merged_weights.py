"""Weights of several layers as one matrix, so that one GEMM reads their common input once."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[rows of all, columns] of parts [rows, columns], which become views of it: an update of theirs lands there."""
    sizes = [part.shape[0] for part in parts]
    whole = torch.empty(sum(sizes), parts[0].shape[1], dtype=parts[0].dtype, device=parts[0].device)
    for part, view in zip(parts, whole.split(sizes), strict=True):
        part.data = view.copy_(part)
    return whole
