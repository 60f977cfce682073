"""The DSA indexer on every device: which cached tokens each query attends to.

    needs hidden_states:  wk | weights_proj, one GEMM where they are merged; key norm + RoPE + Hadamard + fp8 + store
    needs q_lora:         wq_b
    needs both:           query RoPE + Hadamard + fp8 + gate scaling; logits; top-k to slots

Three callers: the CPU platform and ROCm replace the module's forward, for every mode (`forward`, `forward_rocm`); the
fused decode path (`gpu.absorb`) issues the steps on two lanes. On CUDA prefill stays stock's and writes the same pages,
so the representation of a key is stock's: rotated by Hadamard or not, always with fp32 scales, whatever `scale_fmt`
says. `scale_fmt` (any) rounds the query's scales. In exact mode the CPU's pool has float32 keys and nothing is rounded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.model_executor.forward_context import get_attn_backend

from nsa_backend_plugin.engine import hooks, index_cache, linear, unknown
from nsa_backend_plugin.engine.gpu import projections, rocm
from nsa_backend_plugin.ops import index_key_cache, indexer_prep, mqa_logits, projection, topk
from nsa_backend_plugin.ops._torch import exact_indexer
from nsa_backend_plugin.ops.call import Step
from nsa_backend_plugin.runtime import served
from nsa_backend_plugin.runtime.merged_weights import MergedWeights

_MERGED = "nsa_plugin_wk_weights_proj"
#: Bytes of a prefill's logits that exist at once; more queries are scored in chunks.
LOGITS_BYTES = 512 << 20


@dataclass(frozen=True)
class Rows:
    """What the queries of a batch see.

    page_table: [N, max_pages] int32. request: [T] int32, row of page_table of each query; None: query t has row t.
    lengths: [T] int32, cached tokens that each query sees. columns: of its logits, at least the largest length.
    adjacent: queries in a row that have equal rows of the page table. seq_lens: [N] int32, cached tokens of each
    request, of a prefill: its keys are gathered once for all queries; total_tokens: their sum, where the host has it.
    step: of the forward, which all layers share.
    """

    page_table: torch.Tensor
    request: torch.Tensor | None
    lengths: torch.Tensor
    columns: int
    adjacent: int = 1
    seq_lens: torch.Tensor | None = None
    total_tokens: int | None = None
    step: Step = field(default_factory=Step)

    def block_table(self) -> torch.Tensor:
        """[T, max_pages] int32: page_table with one row per query."""
        return self.page_table if self.request is None else self.page_table[self.request.long()]


def forward(
    indexer: Any,
    x: torch.Tensor | tuple[torch.Tensor, ...],
    q_lora: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    layer_id: int,
    return_indices: bool = True,
    **keywords: Any,
) -> torch.Tensor | None:
    """Forward of SGLang's `Indexer`: physical slots [T, index_topk] int32, -1 padded, of what each query attends to.

    x: [T, hidden], or SGLang's (fp8, scale, bf16) of a fused norm. q_lora: [T, q_lora_rank], normalized. The keys of x
    are written to `forward_batch.out_cache_loc` first; return_indices False only writes.
    """
    hooks.fired("rocm_indexer" if rocm.on_rocm() else "indexer")
    unknown.refuse("the indexer", keywords)
    backend = get_attn_backend()
    pool = backend.token_to_kv_pool
    return store_and_select(
        indexer, x, q_lora, positions, forward_batch, pool, backend.indexer_rows(forward_batch), return_indices
    )


def forward_rocm(original: Callable[..., Any], indexer: Any, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """AROUND hook of `Indexer.forward_cuda`, which ROCm shares: ours where our backend serves.

    Stock ROCm writes index-K pages by AITER where it can, else by TileLang with pages of one token. Here one writer
    serves prefill and decode, in the layout of the pool.
    Compile-checked and run on a simulated host (`tests/rocm`), not run on an AMD GPU.
    """
    if not hasattr(get_attn_backend(), "indexer_rows"):
        return original(indexer, *args, **kwargs)
    return forward(indexer, *args, **kwargs)


def store_and_select(
    indexer: Any,
    x: torch.Tensor | tuple[torch.Tensor, ...],
    q_lora: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: Any,
    pool: Any,
    rows: Rows,
    return_indices: bool = True,
) -> torch.Tensor | None:
    """`forward` with the batch's pool and rows at hand."""
    key, head_gate = project(indexer, x)
    if key.shape[0]:
        store_key(indexer, key, positions, forward_batch.out_cache_loc, pool)
    if not return_indices:
        return None
    if forward_batch.seq_lens.numel() == 0:  # an idle data-parallel rank
        return torch.full((key.shape[0], indexer.index_topk), -1, dtype=torch.int32, device=key.device)
    return select_slots(indexer, project_query(indexer, q_lora), head_gate, positions, pool, rows)


def obstacle(indexer: Any) -> str | None:
    """Why wk and weights_proj must be called apart; None if they can be merged."""
    if rocm.on_rocm():
        return "on ROCm weights may be shuffled for AITER's GEMM"
    for name in ("wk", "weights_proj"):
        if reason := linear.obstacle(getattr(indexer, name)):
            return f"indexer.{name} serves itself: {reason}"
    return None


def merge_projection(indexer: Any) -> None:
    """Give the indexer wk | weights_proj [128 + heads, hidden] bf16, where both allow it.

    Stock has such a layer for interleaved RoPE only (`wk_weights_proj`). bf16 weights become views of the merged
    matrix; wk of an fp8 checkpoint is dequantized into it.
    """
    if indexer.use_dsa_indexer_fusion or hasattr(indexer, _MERGED) or obstacle(indexer):
        return
    layers = indexer.wk, indexer.weights_proj
    weight = [functools.partial(linear.bf16_weight, layer) for layer in layers]
    setattr(indexer, _MERGED, linear.merged(layers, weight=weight))


def project(indexer: Any, x: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(key [T, 128], head gate [T, H]) before norm and scaling: slices of one GEMM's output, or of the layers' own."""
    if isinstance(x, tuple):  # the gate is not quantized
        if len(x) != 3:
            raise ValueError(f"hidden_states is a tuple of {len(x)}: expected (fp8, scale, bf16)")
        return indexer.wk(x)[0], _head_gate(indexer.weights_proj, x[2])
    if indexer.use_dsa_indexer_fusion:
        both = indexer.wk_weights_proj(x)[0]
    elif (ours := merged(indexer)) is not None:
        if projections.takes(x, ours.weight):
            both = projection.linear(x, ours.weight, dtype=torch.float32)
        else:
            both = _mm_fp32_out(x, ours.weight)
    else:
        return indexer.wk(x)[0], _head_gate(indexer.weights_proj, x)
    return both[:, : indexer.head_dim], both[:, indexer.head_dim :]


def merged(indexer: Any) -> MergedWeights | None:
    """Our merged projection, while it stands for both layers."""
    merged = getattr(indexer, _MERGED, None)
    return merged if merged is not None and merged.serves(indexer.wk, indexer.weights_proj) else None


def _head_gate(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[T, H] fp32. A plain layer's GEMM is not rounded to bf16, as in stock, and takes fp32 hidden states."""
    if rocm.on_rocm() or linear.obstacle(layer) or linear.is_fp8_blocks(layer):
        return layer(x)[0].float()
    return _mm_fp32_out(x, layer.weight)


def _mm_fp32_out(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T with a float32 result, which torch offers for bf16 operands on GPUs only."""
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.nn.functional.linear(x.float(), weight.float())


def store_key(indexer: Any, key: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, pool: Any) -> None:
    """Write the keys of `project` into the layer's index-K pages, or in exact mode into its float32 rows."""
    norm = indexer.k_norm
    inputs = key, norm.weight, getattr(norm, "bias", None), *_rope(indexer, positions)
    options = {
        "is_neox": indexer.rotary_emb.is_neox_style,
        "norm": _norm_kind(indexer),
        "eps": norm.variance_epsilon,
    }
    exact = _exact_keys(indexer, pool)
    if exact is not None:
        exact[slots.long()] = exact_indexer.key(*inputs, **options)
        return
    pages, layout = index_cache.pages(pool, indexer.layer_id)
    indexer_prep.key_store(
        *inputs,
        pages,
        slots,
        hadamard=_is_rotated(indexer),
        layout=layout,
        page_size=pool.page_size,
        **options,
    )


def project_query(indexer: Any, q_lora: torch.Tensor) -> torch.Tensor:
    """[T, heads, 128] from the normalized q_lora."""
    return indexer.wq_b(q_lora)[0].view(-1, indexer.n_heads, indexer.head_dim)


def quantize_query(
    indexer: Any, query: torch.Tensor, head_gate: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query [T, heads, 128] fp8, weights [T, heads] fp32) for the logits."""
    positions, cos_sin = _rope(indexer, positions)
    return indexer_prep.query(
        query,
        head_gate,
        positions,
        cos_sin,
        weight_scale=_weight_scale(indexer),
        is_neox=indexer.rotary_emb.is_neox_style,
        hadamard=_is_rotated(indexer),
        scale_format=_scale_format(indexer),
    )


def select_slots(
    indexer: Any,
    query: torch.Tensor,
    head_gate: torch.Tensor,
    positions: torch.Tensor,
    pool: Any,
    rows: Rows,
    logits_buffer: torch.Tensor | None = None,
) -> torch.Tensor:
    """Physical slots [T, index_topk] int32 of the tokens that each query attends to, -1 padded.

    logits_buffer: [at least T, at least rows.columns] fp32 for the logits of a decode step.
    """
    if _exact_keys(indexer, pool) is not None:
        logits = _exact_logits(indexer, query, head_gate, positions, pool, rows)
    elif rows.seq_lens is not None:
        return _select_ragged(indexer, query, head_gate, positions, pool, rows)
    else:
        logits = _paged_logits(indexer, query, head_gate, positions, pool, rows, logits_buffer)
    logits = indexer._mask_init_and_local_tokens(logits, rows.lengths)  # some models always keep a few tokens
    return topk.select(
        logits,
        rows.lengths,
        indexer.index_topk,
        page_table=rows.page_table,
        page_rows=rows.request,
        page_size=pool.page_size,
        step=rows.step,
    )


def _paged_logits(
    indexer: Any,
    query: torch.Tensor,
    head_gate: torch.Tensor,
    positions: torch.Tensor,
    pool: Any,
    rows: Rows,
    logits_buffer: torch.Tensor | None,
) -> torch.Tensor:
    """[T, rows.columns] fp32; columns past a row's length are undefined."""
    q_fp8, weights = quantize_query(indexer, query, head_gate, positions)
    pages, layout = index_cache.pages(pool, indexer.layer_id)
    return mqa_logits.paged(
        q_fp8.view(-1, rows.adjacent, *q_fp8.shape[1:]),
        pages,
        weights,
        rows.lengths if rows.adjacent == 1 else rows.lengths.view(-1, rows.adjacent),
        rows.block_table()[:: rows.adjacent],
        rows.columns,
        layout=layout,
        page_size=pool.page_size,
        out=None if logits_buffer is None else logits_buffer[: query.shape[0]],
        step=rows.step,
    )


def _select_ragged(
    indexer: Any, query: torch.Tensor, head_gate: torch.Tensor, positions: torch.Tensor, pool: Any, rows: Rows
) -> torch.Tensor:
    """`select_slots` of a prefill: the batch's keys are gathered once and scored in chunks of queries."""
    assert rows.request is not None
    assert rows.seq_lens is not None
    query, weights = quantize_query(indexer, query, head_gate, positions)
    pages, layout = index_cache.pages(pool, indexer.layer_id)
    key, scale = index_key_cache.gather(
        pages,
        rows.page_table,
        rows.seq_lens,
        layout=layout,
        page_size=pool.page_size,
        total_tokens=rows.total_tokens,
    )
    starts = (rows.seq_lens.cumsum(0, dtype=torch.int32) - rows.seq_lens)[rows.request.long()]
    slots = torch.empty(query.shape[0], indexer.index_topk, dtype=torch.int32, device=query.device)
    step = max(1, LOGITS_BYTES // (4 * max(key.shape[0], 1)))
    for first in range(0, query.shape[0], step):
        chunk = slice(first, first + step)
        lengths, begin = rows.lengths[chunk], starts[chunk]
        logits = mqa_logits.ragged(query[chunk], key, scale, weights[chunk], begin, begin + lengths)
        logits = indexer._mask_init_and_local_tokens(logits, lengths, begin)
        topk.select(
            logits,
            lengths,
            indexer.index_topk,
            row_starts=begin,
            page_table=rows.page_table,
            page_rows=rows.request[chunk],
            page_size=pool.page_size,
            out=slots[chunk],
        )
    return slots


def described(indexer: Any) -> served.Indexer:
    """What decides the calls above, for a report and for compiling ahead."""
    stock_merged = indexer.use_dsa_indexer_fusion
    return served.Indexer(
        heads=indexer.n_heads,
        topk=indexer.index_topk,
        is_neox=indexer.rotary_emb.is_neox_style,
        hadamard=_is_rotated(indexer),
        norm=_norm_kind(indexer),
        scale_format=_scale_format(indexer),
        key_dtype=torch.float32 if not stock_merged and merged(indexer) is not None else torch.bfloat16,
        gate_dtype=torch.bfloat16 if stock_merged else torch.float32,
    )


def _is_rotated(indexer: Any) -> bool:
    """Whether queries and keys are rotated by Hadamard, as stock does with them."""
    return not indexer.use_dsa_indexer_fusion


def _norm_kind(indexer: Any) -> str:
    return "rms" if getattr(indexer.k_norm, "bias", None) is None else "layer"


def _scale_format(indexer: Any) -> str:
    return "ue8m0" if indexer.scale_fmt and not indexer.use_dsa_indexer_fusion else "fp32"


def _exact_keys(indexer: Any, pool: Any) -> torch.Tensor | None:
    """[slots, 128] float32 of the layer in exact mode, else None."""
    layers = getattr(pool, "exact_index_keys", None)
    return None if layers is None else layers[indexer.layer_id - pool.start_layer]


def _exact_logits(
    indexer: Any, query: torch.Tensor, head_gate: torch.Tensor, positions: torch.Tensor, pool: Any, rows: Rows
) -> torch.Tensor:
    """As `_paged_logits`, from float32 queries and keys."""
    keys = _exact_keys(indexer, pool)
    assert keys is not None
    assert rows.request is not None
    rotated = exact_indexer.query(query, *_rope(indexer, positions), is_neox=indexer.rotary_emb.is_neox_style)
    weights = head_gate * _weight_scale(indexer)
    logits = torch.empty(query.shape[0], rows.columns)
    position = torch.arange(rows.columns)
    for request, table in enumerate(rows.page_table):
        own = rows.request == request
        k = keys[table[position // pool.page_size].long() * pool.page_size + position % pool.page_size]
        logits[own] = exact_indexer.logits(rotated[own], k, weights[own])
    return logits


def _rope(indexer: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, cos_sin_cache fp32). On a CPU SGLang keeps the table in the model's dtype: own rows are cast."""
    table = indexer.rotary_emb.cos_sin_cache
    if table.dtype == torch.float32:
        return positions, table
    return torch.arange(positions.shape[0], device=positions.device), table[positions].float().contiguous()


def _weight_scale(indexer: Any) -> float:
    return indexer.softmax_scale * indexer.n_heads**-0.5
