"""Signatures that AITER's functions had, as recorded from its source."""

from __future__ import annotations

from collections.abc import Mapping

from nsa_backend_plugin.ops._vendor.aiter_contract import TARGET

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
#: of it. TARGET is what the adapters are written for; those above are too old, those below are newer.
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
    TARGET: {
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
