"""Peers that live in the engine and therefore have no adapter under `ops/` (which never imports sglang).

Each is prepared once per case, outside the timing, with what the engine prepares once per step (plans, split counts,
metadata), so that its time is its best. Imports are lazy: a peer without its library is reported, not an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.peers import mla as peers_mla
from benchmarks.peers import standard as peers_standard
from benchmarks.workloads import Problem
from benchmarks.workloads.base import HEAD_DIM, SOFTMAX_SCALE, VALUE_DIM
from benchmarks.workloads.dense_mla import row_slots
from nsa_backend_plugin.engine.kernels import sglang_topk_v2
from nsa_backend_plugin.layouts import INDEX_PAGE_SIZE

Call = Callable[[Any], Any]


@dataclass(frozen=True)
class Peer:
    """prepare(problem) -> call(inputs). modules: packages it needs. gpu: whether it needs one."""

    workload: str
    name: str
    prepare: Callable[[Problem], Call]
    modules: tuple[str, ...] = ()
    gpu: bool = True


def _sglang_triton_decode(problem: Problem) -> Call:
    """SGLang's stock Triton MLA decode, with the split counts its backend would choose."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
    from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

    pool, lengths, heads = problem.extra["pool"], problem.extra["lengths"], problem.extra["heads"]
    device, rows, most_splits = pool.device, len(lengths), 256
    splits = torch.empty(rows, dtype=torch.int32, device=device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    width = max(256, 1 << (rows - 1).bit_length())
    get_num_kv_splits_triton[(1,)](
        splits, problem.extra["seq_lens"], rows, 1, heads, 1, most_splits, processors, MAX_NUM_SEQ=width
    )
    partial = torch.empty(rows, heads, most_splits, VALUE_DIM, device=device)
    partial_lse = torch.empty(rows, heads, most_splits, device=device)
    starts = torch.nn.functional.pad(problem.extra["seq_lens"].cumsum(0, dtype=torch.int32), (1, 0))
    out = torch.empty(rows, heads, VALUE_DIM, dtype=torch.bfloat16, device=device)
    slots = {
        id(table): torch.cat([row_slots(t, n, problem.extra["page_size"]) for t, n in zip(table, lengths, strict=True)])
        for _, table in problem.inputs
    }

    def call(item: Any) -> torch.Tensor:
        q, table = item
        decode_attention_fwd(
            q,
            pool,
            pool[..., :VALUE_DIM],
            out,
            starts,
            slots[id(table)],
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


def _deep_gemm_metadata(lens: torch.Tensor) -> torch.Tensor:
    import deep_gemm

    return deep_gemm.get_paged_mqa_logits_metadata(lens, INDEX_PAGE_SIZE, deep_gemm.get_num_sms())


def _deep_gemm_planned(problem: Problem) -> Call:
    """DeepGEMM's paged logits with the schedule made outside, as the engine does once per step."""
    import deep_gemm

    from nsa_backend_plugin.ops.mqa_logits.reference import row_lengths

    next_n = problem.inputs[0][0].shape[1]
    lens = row_lengths(problem.extra["lens"], next_n).contiguous()
    pages = problem.extra["pool"].view(-1, INDEX_PAGE_SIZE, 1, 132)
    metadata = _deep_gemm_metadata(lens)
    width = problem.extra["pages"] * INDEX_PAGE_SIZE

    def call(item: Any) -> torch.Tensor:
        q, weights, table = item
        return deep_gemm.fp8_paged_mqa_logits(q, pages, weights, lens, table, metadata, width, clean_logits=False)

    return call


def _sglang_topk(problem: Problem) -> Call:
    """SGLang's JIT top-k v2 with its plan made outside."""
    lens, table, k = problem.extra["lens"], problem.extra["table"], problem.extra["k"]
    plan = sglang_topk_v2.plan(lens)

    def call(logits: torch.Tensor) -> torch.Tensor:
        out = logits.new_empty((logits.shape[0], k), dtype=torch.int32)
        sglang_topk_v2.run(logits, lens, table, INDEX_PAGE_SIZE, plan, out)
        return out

    return call


def _sglang_chain(problem: Problem) -> Call:
    """DeepGEMM logits, then SGLang's top-k v2: the engine's own chain."""
    logits_of = _deep_gemm_planned(problem)
    lens, k = problem.extra["lens"], problem.extra["k"]
    plan = sglang_topk_v2.plan(lens)

    def call(item: Any) -> torch.Tensor:
        logits = logits_of(item)
        if logits.shape[0] == 1 and logits.stride(0) % 4:  # the kernel asks for 16-byte rows
            logits = logits.as_strided(logits.shape, (-(-logits.shape[1] // 4) * 4, 1))
        out = logits.new_empty((logits.shape[0], k), dtype=torch.int32)
        sglang_topk_v2.run(logits, lens, item[2], INDEX_PAGE_SIZE, plan, out)
        return out

    return call


def _sglang_prep(problem: Problem) -> Call:
    """SGLang's indexer prologue, kernel by kernel: norm, RoPE, two Hadamards, quantization, gate scaling, store."""
    from sglang.kernels.ops.attention.dsa.triton_kernel import act_quant
    from sglang.kernels.ops.attention.fused_store_index_cache import fused_store_index_k_cache
    from sglang.kernels.ops.attention.rope import apply_rope_with_cos_sin_cache_inplace
    from sglang.kernels.ops.quantization.hadamard import hadamard_transform

    extra = problem.extra
    weight, bias = extra["weight"].to(torch.bfloat16), extra["bias"].to(torch.bfloat16)

    def call(item: Any) -> tuple[torch.Tensor, torch.Tensor]:
        q, key, gate, positions, slots = item
        # The engine rotates in place; repeated timing must not rotate the same data again and again.
        q = q.clone()
        normed = torch.nn.functional.layer_norm(key, (128,), weight, bias, 1e-6)
        apply_rope_with_cos_sin_cache_inplace(
            q[..., :64], normed[:, None, :64], extra["cos_sin"], positions, is_neox=extra["is_neox"]
        )
        rotated = hadamard_transform(q, scale=128**-0.5)
        rotated_key = hadamard_transform(normed, scale=128**-0.5)
        q_fp8, scale = act_quant(rotated, 128, None)
        weights = gate.float() * scale.squeeze(-1) * extra["weight_scale"]
        fused_store_index_k_cache(rotated_key, extra["cache"], slots, INDEX_PAGE_SIZE)
        return q_fp8, weights

    return call


def _sglang_index_store(problem: Problem) -> Call:
    from sglang.kernels.ops.attention.fused_store_index_cache import fused_store_index_k_cache

    cache = problem.extra["cache"]

    def call(item: Any) -> torch.Tensor:
        fused_store_index_k_cache(*(item[0], cache, item[1]), INDEX_PAGE_SIZE)
        return cache

    return call


def _sglang_latent_store(problem: Problem) -> Call:
    """SGLang's two kernels, quantize and write; it rotates the key in a kernel before, which is not counted."""
    from sglang.kernels.ops.attention.dsa.quant_k_cache import quantize_k_cache_separate
    from sglang.kernels.ops.kvcache.mla_buffer import set_mla_kv_buffer_triton

    cache = problem.extra["cache"]

    def call(item: Any) -> torch.Tensor:
        nope, rope, slots, _ = item
        set_mla_kv_buffer_triton(cache, slots, *quantize_k_cache_separate(nope, rope))
        return cache

    return call


def _sglang_norm_quant(problem: Problem) -> Call:
    """Two kernels, the norm and the quantization of its result."""
    from flashinfer.norm import rmsnorm
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    weight = problem.extra["weight"]

    def call(item: torch.Tensor) -> Any:
        normalized = rmsnorm(item, weight, 1e-6)
        return sglang_per_token_group_quant_fp8(normalized, 128, column_major_scales=True, scale_tma_aligned=True)

    return call


def _sglang_quantize(problem: Problem) -> Call:
    from sglang.kernels.ops.attention.dsa.quant_k_cache import quantize_k_cache

    return lambda item: quantize_k_cache(item.view(-1, 1, 1, HEAD_DIM))


def _sglang_concat(problem: Problem) -> Call:
    from sglang.kernels.ops.attention.concat_mla import concat_mla_k

    out = problem.extra["out"]

    def call(item: Any) -> torch.Tensor:
        concat_mla_k(out, *item)
        return out

    return call


def _torch_cat(problem: Problem) -> Call:
    """torch.cat of the key with the expanded rotary part: what vLLM replaced (seed 000)."""

    def call(item: Any) -> torch.Tensor:
        nope, rope = item
        return torch.cat([nope, rope.expand(-1, nope.shape[1], -1)], dim=-1)

    return call


PEERS = {
    (p.workload, p.name): p
    for p in (
        Peer("sparse_decode", "flash_mla_planned", peers_mla.flash_mla_planned, ("sgl_kernel",)),
        Peer("sparse_decode", "fa3_planned", peers_mla.fa3_sparse, ("sgl_kernel",)),
        Peer("sparse_decode", "sglang_tilelang", peers_mla.sglang_tilelang, ("sglang", "tilelang")),
        Peer("sparse_prefill", "flash_mla_planned", peers_mla.flash_mla_planned, ("sgl_kernel",)),
        Peer("dense_decode", "flash_mla_planned", peers_mla.flash_mla_dense, ("sgl_kernel",)),
        Peer("dense_decode", "fa3_planned", peers_mla.fa3_dense, ("sgl_kernel",)),
        Peer("dense_decode", "flashinfer_planned", peers_mla.flashinfer_dense, ("flashinfer",)),
        Peer("dense_decode", "sglang_triton", _sglang_triton_decode, ("sglang",)),
        Peer("logits_paged", "deep_gemm_planned", _deep_gemm_planned, ("deep_gemm",)),
        Peer("topk", "sglang_topk_v2_planned", _sglang_topk, ("sglang",)),
        Peer("indexer_chain", "sglang_chain", _sglang_chain, ("sglang", "deep_gemm")),
        Peer("indexer_prep", "sglang_kernels", _sglang_prep, ("sglang",)),
        Peer("index_store", "sglang_fused_store", _sglang_index_store, ("sglang",)),
        Peer("latent_store", "sglang_two_kernels", _sglang_latent_store, ("sglang",)),
        Peer("norm_quant", "sglang_two_kernels", _sglang_norm_quant, ("sglang", "flashinfer")),
        Peer("latent_quantize", "sglang_quantize", _sglang_quantize, ("sglang",)),
        Peer("concat_k", "sglang_jit", _sglang_concat, ("sglang",)),
        Peer("concat_k", "torch_cat", _torch_cat, gpu=False),
        Peer("standard", "torch", peers_standard.sdpa, gpu=False),
        Peer("standard", "flash", peers_standard.flash, ("sgl_kernel",)),
        Peer("standard", "flashinfer", peers_standard.flashinfer, ("flashinfer",)),
        Peer("standard", "triton", peers_standard.triton, ("sglang",)),
    )
}


def names(workload: str) -> list[str]:
    return [name for owner, name in PEERS if owner == workload]


def unavailable(workload: str, name: str, problem: Problem, device: torch.device) -> str:
    """Why a peer cannot run, or "" when it can."""
    peer = PEERS[workload, name]
    if peer.gpu and device.type != "cuda":
        return "needs a GPU"
    missing = [m for m in peer.modules if importlib.util.find_spec(m) is None]
    if missing:
        return f"{missing[0]} is not installed"
    return problem.extra.get("peers_need", {}).get(name, "")


def prepare(workload: str, name: str, problem: Problem) -> Call:
    return PEERS[workload, name].prepare(problem)
