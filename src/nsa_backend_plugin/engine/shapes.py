"""What a server will run, as `runtime.served` describes it: for the start-up report and for compiling ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.configs.model_config import is_deepseek_dsa
from sglang.srt.runtime_context import get_exec, get_parallel, get_schedule, get_spec

from nsa_backend_plugin.engine import index_cache, indexer, merging
from nsa_backend_plugin.engine.gpu import projections, query_projection
from nsa_backend_plugin.layouts import FP8_DTYPES, LATENT_DIM, ROPE_DIM
from nsa_backend_plugin.runtime import served


def model(runner: Any) -> served.Model:
    """Of a ModelRunner."""
    config = runner.model_config.hf_config
    pool = runner.token_to_kv_pool
    parallel = get_parallel()
    whole = parallel.attn_dcp_size == 1
    base = served.Model(
        runner.model_config.num_attention_heads // parallel.attn_tp_size,
        kv=_kind(pool.get_key_buffer(pool.start_layer)),
        page_size=pool.page_size,
        projections=_projections(runner.model),
        values=projections.most_tokens_of_values(runner.model) if whole else 0,
        group=parallel.attn_dcp_size,
    )
    if not is_deepseek_dsa(config):
        return base
    layers = list(merging.layers(runner.model))
    return replace(
        base,
        indexer=indexer.described(layers[0].indexer),
        layout=index_cache.layout_of(pool),
        quantized_q_lora=next((attn.q_lora_rank for attn in layers if query_projection.quantizes(attn)), 0),
        absorbs=projections.most_tokens_of_heads(layers[0].w_kc, runner.dtype) if whole else 0,
    )


def _projections(model: torch.nn.Module) -> tuple[served.Projection, ...]:
    """Of the first layer that has any; none where ours takes none."""
    attn = next((module for module in model.modules() if hasattr(module, "fused_qkv_a_proj_with_mqa")), None)
    if attn is None or not projections.measured(next(attn.parameters()).device):
        return ()
    layers = projections.called_by_sglang(attn)
    merged = []
    if getattr(attn, "indexer", None) is not None:
        if (both := query_projection.merged(attn)) is not None:
            layers.pop("q_b_proj", None)
            merged.append((both, True, torch.bfloat16))
        if (both := indexer.merged(attn.indexer)) is not None:
            merged.append((both, False, torch.float32))
    return tuple(
        served.Projection(
            rows=module.weight.shape[0],
            depth=module.weight.shape[1],
            most_tokens=projections.MOST_TOKENS,
            fp8=module.weight.dtype == torch.float8_e4m3fn,
            norm=norm,
            dtype=dtype,
        )
        for module, norm, dtype in (*((layer, False, torch.bfloat16) for layer in layers.values()), *merged)
        if projections.readable(module.weight, getattr(module, "scale", None))
    )


def _kind(rows: torch.Tensor) -> str:
    if rows.shape[-1] != LATENT_DIM + ROPE_DIM:
        return "packed"
    return "fp8" if rows.dtype in FP8_DTYPES else "bf16"


def steps(context_length: int) -> list[served.Step]:
    """The forwards that graphs are captured for, and a whole chunk of a prompt, over the longest context.

    Of the resolved arguments: later releases leave `ServerArgs` as the user wrote it.
    """
    config = get_exec().graph.cuda_graph_config
    queries = get_spec().speculative_num_draft_tokens or 1
    decode = sorted(config.decode.bs or [1])
    prefill = sorted({*(config.prefill.bs or ()), max(get_schedule().chunked_prefill_size or 0, 1)})
    return [
        *(served.Step(requests, context_length, queries) for requests in decode),
        *(served.Step(1, context_length, tokens, prefill=True) for tokens in prefill),
    ]
