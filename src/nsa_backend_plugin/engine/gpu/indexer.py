"""The indexer of one decode step, or of one step that verifies drafts: several queries for each request.

    needs hidden_states:  wk | weights_proj as one GEMM; key norm + RoPE + Hadamard + fp8 + store
    needs q_lora:         wq_b (`query_projection`)
    needs both:           query RoPE + Hadamard + fp8 + gate scaling; logits; top-k to slots

All of it keeps stock's K representation (Hadamard or not, fp32 scales), because on CUDA prefill writes the same pages
through the stock indexer. The byte layout of the pages is the pool's (`engine.index_cache`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

from nsa_backend_plugin.engine import hooks, index_cache
from nsa_backend_plugin.engine.gpu import merged_weights
from nsa_backend_plugin.ops import indexer_prep, mqa_logits, topk
from nsa_backend_plugin.ops.arch import device_arch, is_rocm

_MERGED = "_nsa_plugin_wk_weights"
#: Weights of which this process keeps a bf16 copy.
_copied: set[str] = set()


def merge_projection(indexer: Any) -> None:
    """Build [128 + heads, hidden] bf16 = wk | weights_proj, so that one GEMM reads hidden_states once.

    Stock does this for interleaved-RoPE indexers only (`wk_weights_proj`). bf16 weights become views of the merged
    tensor, so that weights which are updated while serving land in it. wk of an fp8 checkpoint is dequantized into a
    copy that an update would leave behind: `refuse_weight_update` says so.
    """
    if indexer.use_dsa_indexer_fusion or hasattr(indexer, _MERGED):
        return
    wk, gate = indexer.wk.weight, indexer.weights_proj.weight
    if wk.dtype == gate.dtype == torch.bfloat16:
        merged = merged_weights.joined([wk, gate])
    else:
        merged = torch.cat([_dequantized(indexer.wk), gate.detach().to(torch.bfloat16)])
        remember_copy("the indexer's wk", wk.dtype)
    setattr(indexer, _MERGED, merged)


def remember_copy(weights: str, dtype: torch.dtype) -> None:
    """Weights that are kept as a bf16 copy: `refuse_weight_update` names them."""
    _copied.add(f"{weights} is {dtype}")


def _dequantized(wk: Any) -> torch.Tensor:
    weight = wk.weight.detach()
    if weight.dtype == torch.float8_e4m3fn:
        block = wk.quant_method.quant_config.weight_block_size
        weight = block_quant_dequant(weight, wk.weight_scale_inv, block, torch.bfloat16)
    return weight.to(torch.bfloat16)


def refuse_weight_update(original: Callable[..., str | None], *model: Any) -> str | None:
    """AROUND hook of SGLang's list of reasons against a weight update: None, or why it is refused."""
    reason = original(*model)
    if reason is None and _copied:
        hooks.fired("weight_updates")
        reason = (
            f"Online weight updates are not supported by nsa_plugin while {', '.join(sorted(_copied))}: "
            "a bf16 copy would keep serving the old weights. Serve a bf16 checkpoint to update weights online."
        )
    return reason


def project(indexer: Any, hidden_states: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(key [T, 128], head gate [T, H]) before norm and scaling: on CUDA two slices of one GEMM's output."""
    if isinstance(hidden_states, tuple) or is_rocm(device_arch(hidden_states.device)):
        return _project_apart(indexer, hidden_states)
    if indexer.use_dsa_indexer_fusion:
        both = indexer.wk_weights_proj(hidden_states)[0]
    else:
        both = _mm_fp32_out(hidden_states, getattr(indexer, _MERGED))
    return both[:, : indexer.head_dim], both[:, indexer.head_dim :]


def _project_apart(
    indexer: Any, hidden_states: torch.Tensor | tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through the model's own layers: on ROCm their weights may be shuffled for AITER's GEMM, so they are not merged.

    A fused norm of SGLang hands over (fp8, scale, bf16): the gate is not quantized, and takes the last.
    """
    unquantized = hidden_states
    if isinstance(hidden_states, tuple):
        if len(hidden_states) != 3:
            raise ValueError(f"hidden_states is a tuple of {len(hidden_states)}: expected (fp8, scale, bf16)")
        unquantized = hidden_states[2]
    return indexer.wk(hidden_states)[0], indexer.weights_proj(unquantized)[0].float()


def _mm_fp32_out(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T with a float32 result, which torch offers for bf16 operands on GPUs only."""
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()


def store_key(indexer: Any, key: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, pool: Any) -> None:
    norm = indexer.k_norm
    bias = getattr(norm, "bias", None)
    layout = index_cache.layout_of(pool)
    indexer_prep.key_store(
        key,
        norm.weight,
        bias,
        positions,
        indexer.rotary_emb.cos_sin_cache,
        index_cache.pages(pool, indexer.layer_id, layout),
        slots,
        is_neox=indexer.rotary_emb.is_neox_style,
        norm="rms" if bias is None else "layer",
        eps=norm.variance_epsilon,
        hadamard=not indexer.use_dsa_indexer_fusion,
        layout=layout,
        page_size=pool.page_size,
    )


def project_query(indexer: Any, q_lora: torch.Tensor) -> torch.Tensor:
    """[T, heads, 128] from the normalized q_lora."""
    return indexer.wq_b(q_lora)[0].view(-1, indexer.n_heads, indexer.head_dim)


def quantize_query(
    indexer: Any, query: torch.Tensor, head_gate: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query [T, heads, 128] fp8, weights [T, heads] fp32) for the logits."""
    return indexer_prep.query(
        query,
        head_gate,
        positions,
        indexer.rotary_emb.cos_sin_cache,
        weight_scale=indexer.softmax_scale * indexer.n_heads**-0.5,
        is_neox=indexer.rotary_emb.is_neox_style,
        hadamard=not indexer.use_dsa_indexer_fusion,
        scale_format="ue8m0" if indexer.scale_fmt and not indexer.use_dsa_indexer_fusion else "fp32",
    )


def select_slots(
    indexer: Any,
    query: torch.Tensor,
    head_gate: torch.Tensor,
    positions: torch.Tensor,
    backend: Any,
    per_request: int = 1,
) -> torch.Tensor:
    """Physical slots [T, index_topk] of the tokens that each query attends to, -1 padded.

    per_request: adjacent queries of one request; their rows of the page table are equal, their lengths are not.
    """
    metadata, pool = backend.forward_metadata, backend.token_to_kv_pool
    tokens = query.shape[0]
    q_fp8, weights = quantize_query(indexer, query, head_gate, positions)
    page_table = metadata.real_page_table
    lengths = metadata.cache_seqlens_int32 if per_request == 1 else metadata.dsa_seqlens_expanded
    columns = page_table.shape[1] * pool.page_size
    layout = index_cache.layout_of(pool)
    capturing = torch.cuda.is_current_stream_capturing()
    logits = mqa_logits.paged(
        q_fp8.view(-1, per_request, *q_fp8.shape[1:]),
        index_cache.pages(pool, indexer.layer_id, layout),
        weights,
        lengths if per_request == 1 else lengths.view(-1, per_request),
        page_table[::per_request],
        columns,
        layout=layout,
        page_size=pool.page_size,
        out=backend.logits_buffer[:tokens] if capturing else None,
    )
    logits = indexer._mask_init_and_local_tokens(logits, lengths)
    return topk.select(logits, lengths, indexer.index_topk, page_table=page_table, page_size=pool.page_size)
