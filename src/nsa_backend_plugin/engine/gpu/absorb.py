"""The fused decode path of a DSA layer: replaces `forward_absorb_prepare` of the model for decode batches, and for
those of speculative decoding (verification of drafts, the draft model's extend), where requests have several queries.

    main stream                                          side stream
    fork (of few tokens)
    q_a | kv_a GEMM
    fork (of more)
    q_a norm + quantization                              wk | weights_proj GEMM
    q_b_proj | wq_b GEMM                                 key prep and store
    fork
    W_UK product, straight into q_all[..., :512]         query prep, logits, top-k
    RoPE of q into q_all[..., 512:], norm + RoPE
    + quantize + write of the latent row: one kernel
    join

The main stream's kernels are issued first after each fork: inside graph capture the other order spreads the side lane
over many streams. The side stream starts before the first GEMM where that leaves it room: SGLang's, of more tokens,
takes every multiprocessor and waits for all of them. Where q_b_proj and wq_b cannot be one GEMM, q_b_proj follows the
second fork. Of few tokens, the norm is part of that product (projections.py). q_all is complete when the layer's
attention gets its two halves, so `concat.q_all` is a view there and nothing is concatenated (the cat-skip path).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_executor.forward_context import get_attn_backend

# The names that the replaced method uses, from its own module: their homes move between releases.
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_mla import (
    get_attn_tp_context,
    get_parallel,
    is_kv_b_lora_active,
    maybe_capture_indexer_topk,
)

from nsa_backend_plugin.engine import hooks
from nsa_backend_plugin.engine import indexer as indexer_path
from nsa_backend_plugin.engine.gpu import projections, query_projection, rocm
from nsa_backend_plugin.engine.gpu.dsa_backend import NsaPluginDSABackend
from nsa_backend_plugin.engine.gpu.dual_stream import side_lane
from nsa_backend_plugin.engine.latent_rows import plain_fp8_scale
from nsa_backend_plugin.ops import latent_cache, projection

logger = logging.getLogger(__name__)


def forward_absorb_prepare(
    original: Callable[..., Any],
    attn: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
    zero_allocator: Any,
    llama_4_scaling: torch.Tensor | None = None,
    prev_topk_indices: torch.Tensor | None = None,
) -> Any:
    """AROUND hook: the fused path where it applies, SGLang's own everywhere else."""
    arguments = (attn, positions, hidden_states, forward_batch, zero_allocator, llama_4_scaling, prev_topk_indices)
    prepared = prepare_absorbed(get_attn_backend(), *arguments)
    return original(*arguments) if prepared is None else prepared


def prepare_absorbed(
    backend: Any,
    attn: Any,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
    zero_allocator: Any,
    llama_4_scaling: torch.Tensor | None = None,
    prev_topk_indices: torch.Tensor | None = None,
) -> tuple[Any, ...] | None:
    """What the model's `forward_absorb_prepare` returns, by the fused path; None where that does not apply."""
    if not isinstance(backend, NsaPluginDSABackend):
        return None
    per_request = backend.queries_per_request(forward_batch.forward_mode)
    if per_request is None:  # prefill, or an idle data-parallel rank
        return None
    reason = _obstacle(attn, backend, positions, hidden_states, forward_batch)
    if reason is None and llama_4_scaling is not None:
        reason = "queries are scaled by position"
    if reason is not None:
        _log_once(reason)
        return None
    q_all, slots = _prepare(attn, backend, positions, hidden_states, forward_batch, prev_topk_indices, per_request)
    hooks.fired("fused_decode")
    value_dim = attn.kv_lora_rank
    # k None tells the backend that the latent row is in the cache already.
    return (
        q_all[..., value_dim:],
        None,
        q_all[..., :value_dim],
        None,
        forward_batch,
        zero_allocator,
        positions,
        slots,
        llama_4_scaling,
        None,
    )


def _obstacle(
    attn: Any, backend: NsaPluginDSABackend, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: Any
) -> str | None:
    """Why a batch of decode, verification or draft-extend keeps SGLang's own preparation; None if it need not."""
    if not attn.use_dsa or attn.q_lora_rank is None or attn.rotary_emb is None:
        return "the layer has no indexer, no q_lora or no RoPE"
    unquantized = rocm.unquantized(hidden_states)
    if unquantized is None:
        return "hidden states are quantized"
    if unquantized.shape[0] < backend.forward_metadata.real_page_table.shape[0]:
        return "the batch has fewer rows than its metadata"
    if not positions.shape[0] == forward_batch.out_cache_loc.shape[0] == unquantized.shape[0]:
        return "the batch has rows without a position or a slot"
    if rocm.key_weight(attn).dtype != unquantized.dtype or attn.use_deep_gemm_bmm:
        return f"W_UK is {attn.w_kc.dtype}"
    if get_parallel().dcp_enabled:
        return "decode context parallelism"
    if is_kv_b_lora_active(attn):
        return "a LoRA adapter on kv_b_proj"
    return None


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("nsa_plugin fused decode path is left to SGLang where: %s", reason)


def _prepare(
    attn: Any,
    backend: NsaPluginDSABackend,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    forward_batch: Any,
    prev_topk_indices: torch.Tensor | None,
    per_request: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(q_all [T, heads, 576], slots [T, index_topk]); writes this step's rows of both caches."""
    pool, indexer = backend.token_to_kv_pool, attn.indexer
    value_dim, nope_dim = attn.kv_lora_rank, attn.qk_nope_head_dim
    lane = side_lane(attn.alt_stream, positions.shape[0])
    early = projections.shares_the_gpu(positions)
    if early:
        lane.fork()
    # SGLang multiplies with q_a | kv_a when it is asked for the product.
    q_lora, latent = (
        get_attn_tp_context().fetch_qkv_latent().split([attn.q_lora_rank, value_dim + attn.qk_rope_head_dim], dim=-1)
    )
    if not early:
        lane.fork()
    runs_indexer = attn.should_run_indexer(prev_topk_indices)
    if runs_indexer:
        index_query, project_q = query_projection.project(attn, q_lora)
        with lane:
            key, head_gate = indexer_path.project(indexer, hidden_states)
            indexer_path.store_key(indexer, key, positions, forward_batch.out_cache_loc, pool)
        lane.fork()
        q = project_q()
    else:
        q = attn.q_b_proj_forward(attn.q_a_layernorm(q_lora))

    q_all = q.new_empty(q.shape[0], q.shape[1], value_dim + attn.qk_rope_head_dim)
    q_nope, w_uk, absorbed = q[..., :nope_dim], rocm.key_weight(attn), q_all[..., :value_dim]
    if projections.takes_heads(q_nope, w_uk):
        projection.per_head(q_nope, w_uk.transpose(1, 2), out=absorbed)
    else:
        torch.bmm(q_nope.transpose(0, 1), w_uk, out=absorbed.transpose(0, 1))
    cache = pool.get_key_buffer(attn.layer_id)
    norm, k_nope = attn.kv_a_layernorm, latent[:, :value_dim]
    fused_norm = {"norm_weight": norm.weight, "norm_eps": norm.variance_epsilon}
    if rocm.on_rocm():  # AITER's write does not normalize
        k_nope, fused_norm = norm(k_nope), {}
    latent_cache.store(
        k_nope,
        latent[:, value_dim:],
        cache,
        forward_batch.out_cache_loc,
        positions=positions,
        cos_sin_cache=attn.rotary_emb.cos_sin_cache,
        is_neox=attn.rotary_emb.is_neox_style,
        q_rope=q[..., nope_dim:],
        q_all=q_all,
        kv_scale=plain_fp8_scale(cache),
        **fused_norm,
    )
    slots = prev_topk_indices
    with lane:
        if runs_indexer:
            rows = backend.decode_rows(per_request)
            served = rows.lengths.shape[0]  # tokens behind them pad the batch for tensor or data parallelism
            slots = indexer_path.select_slots(
                indexer,
                index_query[:served],
                head_gate[:served],
                positions[:served],
                pool,
                rows,
                backend.captured_logits(served),
            )
            slots = backend._pad_topk_indices(slots, index_query.shape[0])
        slots = maybe_capture_indexer_topk(attn.layer_id, slots)
    lane.join()
    return q_all, slots
