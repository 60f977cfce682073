"""What a forward pass needs to know about its batch: one row per query token, whatever the mode.

A decode step has one token per request, prefill and mixed batches have several; every token sees its own request's
cache up to and including itself. So one form serves decode, extend, chunked and mixed batches and cached prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenRows:
    """page_table: [B, max_pages] int32 pages of each request. request: [T] int32, row of page_table of each token.
    lengths: [T] int32, cached tokens that each token sees, itself included. max_length: their maximum (at least 1).
    """

    page_table: torch.Tensor
    request: torch.Tensor
    lengths: torch.Tensor
    max_length: int

    def block_table(self) -> torch.Tensor:
        """[T, max_pages] int32: page_table with one row per token."""
        return self.page_table[self.request.long()]


def token_rows(forward_batch: Any, req_to_token: torch.Tensor, page_size: int) -> TokenRows:
    """Rows of a ForwardBatch of any mode that writes its tokens' keys before attention."""
    seq_lens = forward_batch.seq_lens
    batch = seq_lens.shape[0]
    max_length = max(int(seq_lens.max()), 1) if batch else 1
    # Every page holds page_size consecutive positions of one request, so its first slot names it.
    first_slots = req_to_token[forward_batch.req_pool_indices.long(), :max_length:page_size]
    tokens_per_request = torch.ones_like(seq_lens)
    if not forward_batch.forward_mode.is_decode_or_idle():
        tokens_per_request = forward_batch.extend_seq_lens
    return TokenRows(
        page_table=(first_slots // page_size).int(),
        request=torch.repeat_interleave(torch.arange(batch, dtype=torch.int32), tokens_per_request.long()),
        lengths=(forward_batch.positions + 1).int(),
        max_length=max_length,
    )
