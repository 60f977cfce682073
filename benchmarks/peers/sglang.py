"""Kernels of SGLang that have no adapter under `ops/`, which never imports it; and torch's own concatenation.

Each is prepared once per case, outside the timing, with what the engine prepares once per step (plans, split counts,
metadata), so that its time is its best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.workloads import Problem
from benchmarks.workloads.base import VALUE_DIM
from nsa_backend_plugin.layouts import INDEX_PAGE_SIZE
from tools.calls import HEAD_DIM, SOFTMAX_SCALE, Arguments, slots_of

Call = Callable[[Any], Any]


def torch_bmm(problem: Problem) -> Call:
    """As the engine absorbs queries of many tokens: cuBLAS, into the same part of wider rows."""

    def call(item: Arguments) -> torch.Tensor:
        torch.bmm(item["x"].transpose(0, 1), item["weight"].transpose(1, 2), out=item["out"].transpose(0, 1))
        return item["out"]

    return call


def triton_decode(problem: Problem) -> Call:
    """SGLang's stock Triton MLA decode, with the split counts its backend would choose."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    first, lengths = problem.inputs[0], problem.extra["lengths"]
    pool, seq_lens, (rows, heads, _) = first["kv"], first["seq_lens"], first["q"].shape
    device, most_splits = pool.device, 256
    splits = torch.empty(rows, dtype=torch.int32, device=device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    width = max(256, 1 << (rows - 1).bit_length())
    get_num_kv_splits_triton[(1,)](splits, seq_lens, rows, 1, heads, 1, most_splits, processors, MAX_NUM_SEQ=width)
    partial = torch.empty(rows, heads, most_splits, VALUE_DIM, device=device)
    partial_lse = torch.empty(rows, heads, most_splits, device=device)
    starts = torch.nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    out = torch.empty(rows, heads, VALUE_DIM, dtype=torch.bfloat16, device=device)
    slots = [slots_of(item["block_table"], lengths, item["page_size"]) for item in problem.inputs]
    slots_by_table = {id(item["block_table"]): s for item, s in zip(problem.inputs, slots, strict=True)}

    def call(item: Arguments) -> torch.Tensor:
        decode_attention_fwd(
            item["q"],
            pool,
            pool[..., :VALUE_DIM],
            out,
            starts,
            slots_by_table[id(item["block_table"])],
            partial,
            partial_lse,
            splits,
            most_splits,
            SOFTMAX_SCALE,
            1.0,
            1.0,
            has_mla=True,
            use_pdl=True,
        )
        return out

    return call


def prep(problem: Problem) -> Call:
    """SGLang's indexer prologue, kernel by kernel: norm, RoPE, two Hadamards, quantization, gate scaling, store."""
    from sglang.kernels.ops.attention.dsa.triton_kernel import act_quant
    from sglang.kernels.ops.attention.fused_store_index_cache import fused_store_index_k_cache
    from sglang.kernels.ops.attention.rope import apply_rope_with_cos_sin_cache_inplace
    from sglang.kernels.ops.quantization.hadamard import hadamard_transform

    first = problem.inputs[0][1]
    weight, bias = first["norm_weight"].to(torch.bfloat16), first["norm_bias"].to(torch.bfloat16)

    def call(item: tuple[Arguments, Arguments]) -> tuple[torch.Tensor, torch.Tensor]:
        query, store = item
        # The engine rotates in place; repeated timing must not rotate the same data again and again.
        q = query["q"].clone()
        normed = torch.nn.functional.layer_norm(store["key"], (128,), weight, bias, 1e-6)
        apply_rope_with_cos_sin_cache_inplace(
            q[..., :64], normed[:, None, :64], query["cos_sin_cache"], query["positions"], is_neox=query["is_neox"]
        )
        rotated = hadamard_transform(q, scale=128**-0.5)
        rotated_key = hadamard_transform(normed, scale=128**-0.5)
        q_fp8, scale = act_quant(rotated, 128, None)
        weights = query["head_gate"].float() * scale.squeeze(-1) * query["weight_scale"]
        fused_store_index_k_cache(rotated_key, store["cache"], store["slots"], INDEX_PAGE_SIZE)
        return q_fp8, weights

    return call


def index_store(problem: Problem) -> Call:
    from sglang.kernels.ops.attention.fused_store_index_cache import fused_store_index_k_cache

    return lambda item: fused_store_index_k_cache(item["key"], item["cache"], item["slots"], INDEX_PAGE_SIZE)


def latent_store(problem: Problem) -> Call:
    """SGLang's two kernels, quantize and write; it rotates the key in a kernel before, which is not counted."""
    from sglang.kernels.ops.attention.dsa.quant_k_cache import quantize_k_cache_separate
    from sglang.kernels.ops.kvcache.mla_buffer import set_mla_kv_buffer_triton

    def call(item: Arguments) -> None:
        packed = quantize_k_cache_separate(item["k_nope"], item["k_rope"])
        set_mla_kv_buffer_triton(item["cache"], item["slots"], *packed)

    return call


def norm_quant(problem: Problem) -> Call:
    """Two kernels, the norm and the quantization of its result."""
    from flashinfer.norm import rmsnorm
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    def call(item: Arguments) -> Any:
        normalized = rmsnorm(item["x"], item["weight"], 1e-6)
        return sglang_per_token_group_quant_fp8(normalized, 128, column_major_scales=True, scale_tma_aligned=True)

    return call


def projection(problem: Problem) -> Call:
    """DeepGEMM, with what quantizes its tokens; of bf16 weights cuBLAS."""
    from flashinfer.norm import rmsnorm
    from sglang.srt.layers.quantization.fp8_utils import deepgemm_w8a8_block_fp8_linear_with_fallback

    def call(item: Arguments) -> torch.Tensor:
        x, weight, scale, gain = (item[name] for name in ("x", "weight", "weight_scale", "norm_weight"))
        if scale is None:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        tokens = x if gain is None else rmsnorm(x, gain, 1e-6)
        return deepgemm_w8a8_block_fp8_linear_with_fallback(tokens, weight, [128, 128], scale)

    return call


def quantize(problem: Problem) -> Call:
    from sglang.kernels.ops.attention.dsa.quant_k_cache import quantize_k_cache

    return lambda item: quantize_k_cache(item["kv"].view(-1, 1, 1, HEAD_DIM))


def concat(problem: Problem) -> Call:
    from sglang.kernels.ops.attention.concat_mla import concat_mla_k

    def call(item: Arguments) -> torch.Tensor:
        concat_mla_k(item["out"], item["k_nope"], item["k_rope"])
        return item["out"]

    return call


def torch_cat(problem: Problem) -> Call:
    """torch.cat of the key with the expanded rotary part: what vLLM replaced."""

    def call(item: Arguments) -> torch.Tensor:
        nope, rope = item["k_nope"], item["k_rope"]
        return torch.cat([nope, rope.expand(-1, nope.shape[1], -1)], dim=-1)

    return call


def tilelang(problem: Problem) -> Call:
    """SGLang's TileLang kernel over bf16 rows, written for prefill and used by it for decode too."""
    from sglang.kernels.ops.attention.dsa.tilelang_kernel import tilelang_sparse_fwd

    def call(item: Arguments) -> torch.Tensor:
        q, indices = item["q"], item["indices"]
        return tilelang_sparse_fwd(q, item["kv"], indices[:, None], SOFTMAX_SCALE, VALUE_DIM).view(
            *q.shape[:2], VALUE_DIM
        )

    return call
