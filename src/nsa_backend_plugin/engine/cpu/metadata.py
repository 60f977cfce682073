"""What a forward pass needs to know about its batch: one row per query token, whatever the mode.

A decode step has one token per request, prefill and mixed batches have several; every token sees its own request's
cache up to and including itself. So one form serves decode, extend, chunked and mixed batches and cached prefixes.
"""

from __future__ import annotations

import torch

from nsa_backend_plugin.engine.contract import ForwardBatch
from nsa_backend_plugin.engine.indexer import Rows


def token_rows(forward_batch: ForwardBatch, req_to_token: torch.Tensor, page_size: int) -> Rows:
    """Rows of a ForwardBatch of any mode that writes its tokens' keys before attention."""
    seq_lens = forward_batch.seq_lens
    batch = seq_lens.shape[0]
    max_length = max(int(seq_lens.max()), 1) if batch else 1
    # Every page holds page_size consecutive positions of one request, so its first slot names it.
    first_slots = req_to_token[forward_batch.req_pool_indices.long(), :max_length:page_size]
    tokens_per_request = torch.ones_like(seq_lens)
    if not forward_batch.forward_mode.is_decode_or_idle():
        tokens_per_request = forward_batch.extend_seq_lens
    return Rows(
        page_table=(first_slots // page_size).int(),
        request=torch.repeat_interleave(torch.arange(batch, dtype=torch.int32), tokens_per_request.long()),
        lengths=(forward_batch.positions + 1).int(),
        columns=max_length,
    )
