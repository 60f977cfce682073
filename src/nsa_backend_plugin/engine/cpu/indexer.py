"""Forward of SGLang's DSA `Indexer` through our operations: project, store the keys, select physical slots.

Registered as the module's forward on the CPU platform. Exact mode keeps queries and keys in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.forward_context import get_attn_backend, get_token_to_kv_pool

from nsa_backend_plugin.engine import hooks, index_cache
from nsa_backend_plugin.engine.cpu.metadata import TokenRows
from nsa_backend_plugin.ops import indexer_prep, mqa_logits, topk
from nsa_backend_plugin.ops.indexer_prep import reference as float_prep
from nsa_backend_plugin.ops.mqa_logits import reference as float_logits


@dataclass(frozen=True)
class Rope:
    """positions: [T] rows of cos_sin [*, rope_dim] fp32; is_neox: half-split pairs, else interleaved."""

    positions: torch.Tensor
    cos_sin: torch.Tensor
    is_neox: bool


def forward(
    indexer: Any,
    x: torch.Tensor,
    q_lora: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    layer_id: int,
    return_indices: bool = True,
    **_: Any,
) -> torch.Tensor | None:
    """Physical slots [T, index_topk] int32, -1 padded, of the tokens that each query attends to.

    x: [T, hidden], q_lora: [T, q_lora_rank]. The keys of x are written to `forward_batch.out_cache_loc` first.
    return_indices False only writes.
    """
    hooks.fired("indexer")
    pool = get_token_to_kv_pool()
    rope = _rope(indexer, positions)
    key = indexer.wk(x)[0]
    if pool.exact_index_keys is None:
        _store_key(indexer, key, rope, pool, layer_id, forward_batch.out_cache_loc)
    else:
        _store_exact_key(indexer, key, rope, pool, layer_id, forward_batch.out_cache_loc)
    if not return_indices:
        return None
    rows = get_attn_backend().get_indexer_metadata(layer_id, forward_batch)
    query = indexer.wq_b(q_lora)[0].view(-1, indexer.n_heads, indexer.head_dim)
    head_gate = torch.nn.functional.linear(x.float(), indexer.weights_proj.weight.float())
    logits_of = _logits if pool.exact_index_keys is None else _exact_logits
    logits = logits_of(indexer, query, head_gate, rope, pool, layer_id, rows)
    logits = indexer._mask_init_and_local_tokens(logits, rows.lengths)  # some models always keep a few tokens
    return topk.select(
        logits,
        rows.lengths,
        indexer.index_topk,
        page_table=rows.page_table,
        page_rows=rows.request,
        page_size=pool.page_size,
    )


def _rope(indexer: Any, positions: torch.Tensor) -> Rope:
    """The tokens' own rows of the table, in float32: on CPU SGLang keeps the table in the model's dtype."""
    embedding = indexer.rotary_emb
    own_rows = embedding.cos_sin_cache[positions].float().contiguous()
    return Rope(torch.arange(positions.shape[0]), own_rows, embedding.is_neox_style)


def _norm(indexer: Any) -> dict[str, Any]:
    bias = getattr(indexer.k_norm, "bias", None)
    return {"norm": "rms" if bias is None else "layer", "eps": indexer.k_norm.variance_epsilon}


def _scale_format(indexer: Any) -> str:
    return "ue8m0" if indexer.scale_fmt == "ue8m0" else "fp32"


def _weight_scale(indexer: Any) -> float:
    return indexer.softmax_scale * indexer.n_heads**-0.5


def _store_key(indexer: Any, key: torch.Tensor, rope: Rope, pool: Any, layer_id: int, slots: torch.Tensor) -> None:
    layout = index_cache.layout_of(pool)
    indexer_prep.key_store(
        key,
        indexer.k_norm.weight,
        getattr(indexer.k_norm, "bias", None),
        rope.positions,
        rope.cos_sin,
        index_cache.pages(pool, layer_id, layout),
        slots,
        is_neox=rope.is_neox,
        layout=layout,
        scale_format=_scale_format(indexer),
        page_size=pool.page_size,
        **_norm(indexer),
    )


def _logits(
    indexer: Any,
    query: torch.Tensor,
    head_gate: torch.Tensor,
    rope: Rope,
    pool: Any,
    layer_id: int,
    rows: TokenRows,
) -> torch.Tensor:
    """[T, max_length] fp32; columns past a row's length are undefined."""
    q_fp8, weights = indexer_prep.query(
        query,
        head_gate,
        rope.positions,
        rope.cos_sin,
        weight_scale=_weight_scale(indexer),
        is_neox=rope.is_neox,
        scale_format=_scale_format(indexer),
    )
    layout = index_cache.chosen_layout(query.device)  # the reader's own choice: a pool with another one refuses it
    return mqa_logits.paged(
        q_fp8[:, None],
        index_cache.pages(pool, layer_id, layout),
        weights,
        rows.lengths,
        rows.block_table(),
        rows.max_length,
        layout=layout,
        page_size=pool.page_size,
    )


def _store_exact_key(
    indexer: Any, key: torch.Tensor, rope: Rope, pool: Any, layer_id: int, slots: torch.Tensor
) -> None:
    norm = indexer.k_norm
    normalized = float_prep.normalize(key, norm.weight, getattr(norm, "bias", None), **_norm(indexer))
    rotated = float_prep.rotate(normalized, rope.positions, rope.cos_sin, rope.is_neox, hadamard=False)
    pool.exact_index_keys[layer_id - pool.start_layer][slots.long()] = rotated


def _exact_logits(
    indexer: Any,
    query: torch.Tensor,
    head_gate: torch.Tensor,
    rope: Rope,
    pool: Any,
    layer_id: int,
    rows: TokenRows,
) -> torch.Tensor:
    """As `_logits`, from float32 queries and keys."""
    rotated = float_prep.rotate(query, rope.positions, rope.cos_sin, rope.is_neox, hadamard=False)
    weights = head_gate * _weight_scale(indexer)
    keys = pool.exact_index_keys[layer_id - pool.start_layer]
    logits = torch.empty(query.shape[0], rows.max_length)
    position = torch.arange(rows.max_length)
    for request, table in enumerate(rows.page_table):
        own = rows.request == request
        k = keys[table[position // pool.page_size].long() * pool.page_size + position % pool.page_size]
        logits[own] = float_logits.weighted_logits(rotated[own], k, torch.ones(k.shape[0]), weights[own])
    return logits
