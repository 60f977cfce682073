"""The indexer's forward on ROCm, for every mode: what it writes is what the fused decode path reads.

Stock ROCm writes index-K pages by AITER where it can, else by TileLang with pages of one token. Here one writer
serves prefill and decode, in the layout of the pool. Prefill gathers the batch's keys once and scores them in chunks.
Compile-checked and run on a simulated host (`tests/rocm`), not run on an AMD GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_executor.forward_context import get_attn_backend

from nsa_backend_plugin.engine import hooks, index_cache
from nsa_backend_plugin.engine.gpu import indexer as steps
from nsa_backend_plugin.ops import index_key_cache, mqa_logits, topk

#: Bytes of prefill logits that exist at once; more queries are scored in chunks.
LOGITS_BYTES = 512 << 20


def forward(original: Callable[..., Any], indexer: Any, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """AROUND hook of `Indexer.forward_cuda`, which ROCm shares: ours where our backend serves."""
    from nsa_backend_plugin.engine.gpu.dsa_backend import NsaPluginDSABackend

    backend = get_attn_backend()
    if not isinstance(backend, NsaPluginDSABackend):
        return original(indexer, *args, **kwargs)
    hooks.fired("rocm_indexer")
    return store_and_select(backend, indexer, *args, **kwargs)


def store_and_select(
    backend: Any,
    indexer: Any,
    x: torch.Tensor | tuple[torch.Tensor, ...],
    q_lora: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    layer_id: int,
    return_indices: bool = True,
    **_: Any,
) -> torch.Tensor | None:
    """Physical slots [T, index_topk] int32, -1 padded; the keys of x are written to `out_cache_loc` first.

    x: [T, hidden], or SGLang's (fp8, scale, bf16) of a fused norm. return_indices False only writes.
    """
    key, head_gate = steps.project(indexer, x)
    if key.shape[0]:
        steps.store_key(indexer, key, positions, forward_batch.out_cache_loc, backend.token_to_kv_pool)
    if not return_indices:
        return None
    if forward_batch.seq_lens.numel() == 0:  # an idle data-parallel rank
        return torch.full((key.shape[0], indexer.index_topk), -1, dtype=torch.int32, device=key.device)
    query = steps.project_query(indexer, q_lora)
    if forward_batch.forward_mode.is_decode_or_idle():
        return steps.select_slots(indexer, query, head_gate, positions, backend)
    return _select_prefill(backend, indexer, query, head_gate, positions)


def _select_prefill(
    backend: Any, indexer: Any, query: torch.Tensor, head_gate: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    metadata, pool = backend.forward_metadata, backend.token_to_kv_pool
    lengths, request = metadata.dsa_seqlens_expanded, metadata.token_to_batch_idx.int()
    query, weights = steps.quantize_query(indexer, query, head_gate, positions)
    layout = index_cache.layout_of(pool)
    key, scale = index_key_cache.gather(
        index_cache.pages(pool, indexer.layer_id, layout),
        metadata.real_page_table,
        metadata.cache_seqlens_int32,
        layout=layout,
        page_size=pool.page_size,
    )
    ends = metadata.cache_seqlens_int32.cumsum(0, dtype=torch.int32)
    starts = (ends - metadata.cache_seqlens_int32)[request.long()]
    slots = torch.empty(query.shape[0], indexer.index_topk, dtype=torch.int32, device=query.device)
    step = max(1, LOGITS_BYTES // (4 * max(key.shape[0], 1)))
    for first in range(0, query.shape[0], step):
        rows = slice(first, first + step)
        logits = mqa_logits.ragged(query[rows], key, scale, weights[rows], starts[rows], starts[rows] + lengths[rows])
        logits = indexer._mask_init_and_local_tokens(logits, lengths[rows], starts[rows])
        topk.select(
            logits,
            lengths[rows],
            indexer.index_topk,
            row_starts=starts[rows],
            page_table=metadata.real_page_table,
            page_rows=request[rows],
            page_size=pool.page_size,
            out=slots[rows],
        )
    return slots
