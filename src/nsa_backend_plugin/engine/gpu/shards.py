"""Decode context parallelism: which cached tokens are this GPU's, and the form of its answer over them alone.

SGLang gives token p of a request to GPU p % size of a group. It allocates slots for the whole group, in pages that are
`size` times as large: slot s is row s // size of GPU s % size. Every GPU gets the queries of the group's heads, and
SGLang's model code merges the answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

#: SGLang's model code takes the lse for one to the base 2 unless it knows the backend by name.
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Share:
    """This GPU's part of every context: all of it where size is 1."""

    size: int
    rank: int

    @classmethod
    def of(cls, parallel: Any) -> Share:
        """parallel: SGLang's `get_parallel()`."""
        size = parallel.attn_dcp_size
        return cls(size, parallel.attn_dcp_rank if size > 1 else 0)

    @property
    def is_partial(self) -> bool:
        return self.size > 1

    def lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """How many of the first `lengths` tokens are this GPU's."""
        return (lengths + (self.size - 1 - self.rank)) // self.size

    def page_table(self, table: torch.Tensor) -> torch.Tensor:
        """[B, pages of its own tokens] of SGLang's table [B, pages], which counts a larger page as `size` pages."""
        return table[:, :: self.size] // self.size

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """The rows of those slots that are this GPU's, in their order. Waits for the device."""
        return slots[slots % self.size == self.rank] // self.size

    def selected(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows [T, K] int32 of those slots [T, K] that are this GPU's, then -1, and how many each query has [T])."""
        from sglang.kernels.ops.attention.dsa.transform_index import transform_index_page_table_dcp

        return transform_index_page_table_dcp(slots, self.size, self.rank)


def answer(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, heads*512], lse [T, heads] to the base 2), as the model code merges them.

    out: [T, heads, 512]. lse: natural, -inf where this GPU has nothing; FlashAttention 3's lies head by head, and the
    model code sends it (`ag_rs`) as it lies.
    """
    return out.view(out.shape[0], -1), (lse * LOG2_E).contiguous()
