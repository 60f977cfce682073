"""What our adapters need of AITER's functions.

AITER moves fast and has no stable interface. `check_installed` compares the installed package with the adapters'
calls (`nsa-plugin doctor` on a ROCm host); the tests do the same with the fakes, and with signatures that AITER had
(`tests/rocm/aiter_signatures.py`). A call fits when each argument that an adapter passes by position has its name
there, each keyword exists, and every parameter that it leaves out has a default.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """How an adapter calls one function: the names of its positional arguments, in order, and its keywords."""

    module: str
    function: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.function}"


CALLS = tuple(
    Call(module, function, tuple(positional.split()), tuple(keywords.split()))
    for module, function, positional, keywords in (
        ("aiter", "indexer_k_quant_and_cache", "k kv_cache slot_mapping quant_block_size scale_fmt", "preshuffle"),
        ("aiter", "cp_gather_indexer_k_quant_cache", "kv_cache dst_k dst_scale block_table cu_seq_lens", "preshuffle"),
        (
            "aiter.ops.triton.pa_mqa_logits",
            "deepgemm_fp8_paged_mqa_logits",
            "q_fp8 kv_cache weights out_logits context_lens kv_indices max_model_len",
            "Preshuffle KVBlockSize",
        ),
        (
            "aiter.ops.triton.fp8_mqa_logits",
            "fp8_mqa_logits",
            "Q KV kv_scales weights cu_starts cu_ends",
            "clean_logits",
        ),
        (
            "aiter.mla",
            "mla_decode_fwd",
            "q kv_buffer o qo_indptr kv_indptr kv_indices kv_last_page_lens max_seqlen_q",
            "sm_scale work_meta_data work_indptr work_info_set reduce_indptr reduce_final_map reduce_partial_map "
            "q_scale kv_scale",
        ),
        (
            "aiter",
            "get_mla_metadata_info_v1",
            "batch_size max_seqlen_qo num_head_qo q_dtype kv_dtype",
            "is_sparse fast_mode intra_batch_mode",
        ),
        (
            "aiter",
            "get_mla_metadata_v1",
            "seqlens_qo_indptr seqlens_kv_indptr kv_last_page_lens num_heads_per_head_k num_heads_k is_causal "
            "work_metadata_ptrs work_info_set work_indptr reduce_indptr reduce_final_map reduce_partial_map",
            "page_size kv_granularity max_seqlen_qo uni_seqlen_qo fast_mode topk max_split_per_batch intra_batch_mode "
            "dtype_q dtype_kv",
        ),
        (
            "aiter.ops.triton.fused_kv_cache",
            "fused_qk_rope_cat_and_cache_mla",
            "q_nope q_pe k_nope k_pe kv_cache slot_mapping pos cos sin k_scale is_neox",
            "apply_scale q_out",
        ),
    )
)

#: The AITER that the adapters are written for: main of this date.
TARGET = "main 2026-08-22"


def recorded_signature(parameters: str) -> inspect.Signature:
    """The signature of a text: names of parameters in order, "=" marks a default."""
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
