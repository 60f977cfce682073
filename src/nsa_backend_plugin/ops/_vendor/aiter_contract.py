"""What our adapters need of AITER's functions, and the signatures that AITER had, as recorded from its source.

AITER moves fast and has no stable interface. `check_installed` compares the installed package with the adapters'
calls (`nsa-plugin doctor` on a ROCm host); the tests do the same with the fakes, and with every recorded signature.
A call fits when each argument that an adapter passes by position has the recorded name there, each keyword exists,
and every parameter that it leaves out has a default.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """How an adapter calls one function: the names of its positional arguments, in order, and its keywords."""

    module: str
    function: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CALLS: tuple[Call, ...] = (
    Call(
        "aiter",
        "indexer_k_quant_and_cache",
        _names("k kv_cache slot_mapping quant_block_size scale_fmt"),
        _names("preshuffle"),
    ),
    Call(
        "aiter",
        "cp_gather_indexer_k_quant_cache",
        _names("kv_cache dst_k dst_scale block_table cu_seq_lens"),
        _names("preshuffle"),
    ),
    Call(
        "aiter.ops.triton.pa_mqa_logits",
        "deepgemm_fp8_paged_mqa_logits",
        _names("q_fp8 kv_cache weights out_logits context_lens kv_indices max_model_len"),
        _names("Preshuffle KVBlockSize"),
    ),
    Call(
        "aiter.ops.triton.fp8_mqa_logits",
        "fp8_mqa_logits",
        _names("Q KV kv_scales weights cu_starts cu_ends"),
        _names("clean_logits"),
    ),
    Call(
        "aiter.mla",
        "mla_decode_fwd",
        _names("q kv_buffer o qo_indptr kv_indptr kv_indices kv_last_page_lens max_seqlen_q"),
        _names(
            "sm_scale work_meta_data work_indptr work_info_set reduce_indptr reduce_final_map reduce_partial_map "
            "q_scale kv_scale"
        ),
    ),
    Call(
        "aiter",
        "get_mla_metadata_info_v1",
        _names("batch_size max_seqlen_qo num_head_qo q_dtype kv_dtype"),
        _names("is_sparse fast_mode intra_batch_mode"),
    ),
    Call(
        "aiter",
        "get_mla_metadata_v1",
        _names(
            "seqlens_qo_indptr seqlens_kv_indptr kv_last_page_lens num_heads_per_head_k num_heads_k is_causal "
            "work_metadata_ptrs work_info_set work_indptr reduce_indptr reduce_final_map reduce_partial_map"
        ),
        _names(
            "page_size kv_granularity max_seqlen_qo uni_seqlen_qo fast_mode topk max_split_per_batch intra_batch_mode "
            "dtype_q dtype_kv"
        ),
    ),
    Call(
        "aiter.ops.triton.fused_kv_cache",
        "fused_qk_rope_cat_and_cache_mla",
        _names("q_nope q_pe k_nope k_pe kv_cache slot_mapping pos cos sin k_scale is_neox"),
        _names("apply_scale q_out"),
    ),
)

_MLA_DECODE = (
    "q kv_buffer o qo_indptr kv_indptr kv_indices kv_last_page_lens max_seqlen_q page_size= nhead_kv= sm_scale= "
    "logit_cap= num_kv_splits= num_kv_splits_indptr= work_meta_data= work_indptr= work_info_set= reduce_indptr= "
    "reduce_final_map= reduce_partial_map= q_scale= kv_scale= intra_batch_mode= return_logits= return_lse="
)
_MLA_PLAN = (
    "seqlens_qo_indptr seqlens_kv_indptr kv_last_page_lens num_heads_per_head_k num_heads_k is_causal "
    "work_metadata_ptrs work_info_set work_indptr reduce_indptr reduce_final_map reduce_partial_map page_size= "
    "kv_granularity= max_seqlen_qo= uni_seqlen_qo= fast_mode= topk= max_split_per_batch= intra_batch_mode="
)
_ROPE_CAT = (
    "q_nope q_pe k_nope k_pe kv_cache slot_mapping pos cos sin k_scale is_neox num_decode_toks_for_zeros= apply_scale= "
    "q_out= decode_q_pe_out= k_pe_out= q_out_dtype="
)
_PAGED_LOGITS = (
    "q_fp8 kv_cache weights out_logits context_lens kv_indices max_model_len Preshuffle= KVBlockSize= ChunkK= "
    "TotalCuCount= WavePerEU= VarCtxSchedule="
)

#: AITER source of a version -> function -> its parameters in order, "=" marks a default. A version lists what was seen
#: of it. `main 2026-08-22` is what the adapters are written for; those above are too old, those below are newer.
RECORDED: Mapping[str, Mapping[str, str]] = {
    "2025 (mla_decode_fwd: commit 986eb25)": {
        "mla_decode_fwd": (
            "q kv_buffer o qo_indptr kv_indptr kv_indices kv_last_page_lens max_seqlen_q sm_scale= logit_cap= "
            "num_kv_splits="
        ),
        "get_mla_metadata_v1": "seqlens_qo_indptr seqlens_kv_indptr num_heads_per_head_k num_heads_k is_causal",
        "deepgemm_fp8_paged_mqa_logits": (
            "q_fp8 kv_cache_fp8 weights out_logits context_lens kv_indices max_model_len ChunkK= SplitKV="
        ),
    },
    "before preshuffle (aiter pull request 2879)": {
        "indexer_k_quant_and_cache": "k kv_cache slot_mapping quant_block_size scale_fmt",
        "cp_gather_indexer_k_quant_cache": "kv_cache dst_k dst_scale block_table cu_seq_lens",
        "get_mla_metadata_v1": (
            "seqlens_qo_indptr seqlens_kv_indptr num_heads_per_head_k num_heads_k is_causal work_metadata_ptrs "
            "work_indptr work_info reduce_indptr reduce_final_map reduce_partial_map kv_granularity= max_seqlen_qo= "
            "uni_seqlen_qo= fast_mode= topk= max_split_per_batch= intra_batch_mode= dtype_q= dtype_kv="
        ),
        "fused_qk_rope_cat_and_cache_mla": (
            "q_nope q_pe k_nope k_pe kv_cache slot_mapping pos cos sin k_scale is_neox"
        ),
    },
    "main 2026-08-22": {
        "indexer_k_quant_and_cache": "k kv_cache slot_mapping quant_block_size scale_fmt preshuffle=",
        "cp_gather_indexer_k_quant_cache": "kv_cache dst_k dst_scale block_table cu_seq_lens preshuffle=",
        "deepgemm_fp8_paged_mqa_logits": _PAGED_LOGITS,
        "fp8_mqa_logits": "Q KV kv_scales weights cu_starts cu_ends clean_logits=",
        "mla_decode_fwd": _MLA_DECODE,
        "get_mla_metadata_info_v1": (
            "batch_size max_seqlen_qo num_head_qo q_dtype kv_dtype is_sparse fast_mode= num_kv_splits= "
            "intra_batch_mode= max_split_per_batch="
        ),
        "get_mla_metadata_v1": _MLA_PLAN + " dtype_q= dtype_kv=",
        "fused_qk_rope_cat_and_cache_mla": _ROPE_CAT,
    },
    "with split query dtypes": {
        "get_mla_metadata_v1": (
            _MLA_PLAN + " is_cp_round_robin= mla_version= dtype_q_nope= dtype_q_rope= dtype_kv_nope= dtype_kv_rope="
        ),
        "fused_qk_rope_cat_and_cache_mla": _ROPE_CAT + " shuffled_kv_cache= upcast_operand=",
    },
    "with split and joint query dtypes": {
        "get_mla_metadata_v1": (
            _MLA_PLAN
            + " is_cp_round_robin= mla_version= dtype_q_nope= dtype_q_rope= dtype_kv_nope= dtype_kv_rope= dtype_q= "
            "dtype_kv="
        ),
    },
    "newer main (mla_decode_fwd: commit 000edf3)": {
        "mla_decode_fwd": _MLA_DECODE + " g_kv_indptr= cp_world_size= cp_rank= causal=",
        "deepgemm_fp8_paged_mqa_logits": _PAGED_LOGITS + " SplitKV= PersistentSchedule=",
    },
}
TARGET = "main 2026-08-22"


def recorded_signature(parameters: str) -> inspect.Signature:
    """The signature of one entry of RECORDED, or of a text like it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(word.rstrip("="), kind, default=None if word.endswith("=") else inspect.Parameter.empty)
            for word in parameters.split()
        ]
    )


def mismatches(call: Call, signature: inspect.Signature) -> list[str]:
    """Why the adapter's call does not fit a signature; empty when it does."""
    parameters = list(signature.parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return [f"{call.name}{signature}: takes anything, so its parameters cannot be checked"]
    names = [p.name for p in parameters]
    found = [
        f"{call.name}: argument {place} is {names[place] if place < len(names) else 'missing'}, expected {name}"
        for place, name in enumerate(call.positional)
        if place >= len(names) or names[place] != name
    ]
    found += [f"{call.name}: has no parameter {name}" for name in call.keywords if name not in names]
    passed = {*call.positional, *call.keywords}
    found += [
        f"{call.name}: parameter {p.name} is required and not passed"
        for p in parameters[len(call.positional) :]
        if p.default is p.empty and p.name not in passed
    ]
    return found


def _signature(function: Callable[..., Any], name: str) -> inspect.Signature:
    """Of a plain function, or of the torch operator of its name.

    AITER registers most functions as operators of torch (`torch_compile_guard`) and hands out
    `wrapper_custom(*args, **kwargs)`, which has lost its signature: the operator's schema still has the parameters.
    """
    signature = inspect.signature(function)
    operator = getattr(torch.ops.aiter, name, None)
    if list(signature.parameters) != ["args", "kwargs"] or operator is None:
        return signature
    arguments = operator.default._schema.arguments
    return recorded_signature(" ".join(a.name + ("=" if a.has_default_value() else "") for a in arguments))


def check_installed(load: Callable[[str], Any] = importlib.import_module) -> list[str]:
    """Mismatches between the adapters' calls and the AITER that is installed; missing functions included."""
    found = []
    for call in CALLS:
        try:
            signature = _signature(getattr(load(call.module), call.function), call.function)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            found.append(f"{call.name}: {type(error).__name__}: {error}")
            continue
        found += mismatches(call, signature)
    return found
