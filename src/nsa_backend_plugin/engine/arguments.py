"""Every argument of SGLang's servers, every environment variable of its DSA path and every MLA architecture: what
nsa_plugin does with it.

One entry for each name of each supported release: `tests/test_arguments.py` reads them from the wheels, and fails for a
name that is missing here. What is not listed (a newer release, an extension) must keep SGLang's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import release

#: Algorithms whose draft is the model's own next-token layer; SGLang resolves both to EAGLE.
SPECULATIVE = ("EAGLE", "NEXTN")


@dataclass(frozen=True)
class Refused:
    """An argument or a variable that is refused with any value but `served`.

    why: the end of a sentence that begins with "nsa_plugin". asked: SGLang fills the argument in while it resolves
    them, so that only the value that the user gave is judged. advice: what to do instead.
    """

    why: str
    served: tuple[Any, ...] = (False,)
    asked: bool = False
    advice: str = "Start without it, or choose another --attention-backend"


_UNSET = (None,)


def _names(words: str) -> list[str]:
    return words.split()


def _choose(operation: str) -> str:
    return f"Start without it: NSA_PLUGIN_{operation}_IMPL chooses among them"


def _no(feature: str, served: tuple[Any, ...] = (False,), asked: bool = False, advice: str = Refused.advice) -> Refused:
    return Refused(f"does not support {feature} yet", served, asked, advice)


def host_receive_off(package: Path | None) -> float:
    """What turns off that a decode server receives caches in host memory: 0 in 0.5.21, 1 in later releases."""
    later = release.mentions("sglang.srt.arg_groups.fields.disagg", "1 disables host receive", package)
    return 1.0 if later else 0.0


_OWN_KERNELS = "runs kernels of its own"
_HICACHE = "hierarchical cache (HiCache)"
_CP_SPLIT = "another split of a prompt over GPUs than interleave (round-robin)"
_USE_INTERLEAVE = "Use --enable-prefill-cp --cp-strategy interleave"
_DRAFT_WINDOW = _no("a draft model that sees a part of the context", _UNSET)
_HOOKED_MODULES = "hooks on the model's modules (some of them run as one kernel, which calls no hook)"

#: Arguments that move or rewrite cache rows behind the backend's back, give it batches it does not know, or ask for
#: something that only another backend does.
REFUSED: Mapping[str, Refused] = {
    # Caches
    "hicache_storage_backend": _no("a store of the hierarchical cache other than files", (None, "file")),
    "enable_lmcache": _no("LMCache"),
    "enable_flexkv": _no("FlexKV"),
    "radix_cache_backend": _no("another radix cache than SGLang's own", _UNSET),
    "enable_unified_cache_external_linker": _no("an external store behind the radix cache"),
    "enable_linker_mla_dedup": _no("an external store behind the radix cache"),
    "enable_kv_cache_sharding": _no("a KV cache that is sharded over GPUs"),
    "enable_dsa_cache_layer_split": _no("layers of the cache that are split over GPUs"),
    "enable_hisparse": _no("HiSparse"),
    "enable_unified_memory": _no("the unified memory pool"),
    "enable_page_major_kv_layout": _no("the page-major KV layout"),
    "prefill_only_disable_kv_cache": _no("prefill without a KV cache"),
    "quantization_param_path": _no("scales of the KV cache from a file", _UNSET),
    "prefill_kv_cache_dequant_dtype": _no("prefill over a dequantized copy of the cache", ("auto",)),
    "speculative_draft_kv_cache_dtype": _no("a draft model with a KV dtype of its own", _UNSET),
    "kv_canary": _no("the KV cache canary", ("none",)),
    "enable_streaming_session": _no("streaming sessions"),
    "enable_session_radix_cache": _no("streaming sessions"),
    # Who computes what
    "disaggregation_transfer_backend": _no("another transfer of caches than Mooncake's", ("mooncake", "mooncake_tcp")),
    "disaggregation_decode_enable_radix_cache": _no("a decode server that keeps prefixes"),
    "disaggregation_decode_enable_offload_kvcache": _no("a decode server that stores its cache"),
    "disaggregation_decode_retraction_backup": _no(
        "a chosen store for what a decode server retracts", _UNSET, asked=True
    ),
    "disaggregation_decode_host_receive_threshold": _no(
        "caches that are received in host memory", (host_receive_off(None),)
    ),
    "disaggregation_decode_allocation_policy": _no("decode memory that is reserved after prefill", ("early",)),
    "disaggregation_enable_kv_checksum": _no("checksums of transferred caches"),
    "enable_pd_role_switch": _no("servers that change between prefill and decode"),
    "optimistic_prefill_attempts": _no("prefill before its decode server has answered", (0,)),
    "decoupled_spec_role": _no("a draft model in another server", ("null",)),
    "cp_strategy": _no(_CP_SPLIT, (None, "interleave"), advice=_USE_INTERLEAVE),
    "dsa_prefill_cp_mode": _no(_CP_SPLIT, ("round-robin-split",), advice=_USE_INTERLEAVE),
    "enable_prefill_context_parallel": _no(
        "prefill context parallelism of models without an indexer",
        advice=f"Start without it. For a model with an indexer: {_USE_INTERLEAVE}",
    ),
    "enable_cp_tp_group_sharing": _no("one group of GPUs for context and tensor parallelism"),
    "enable_cp_decode_attn_tp": _no("attention's weights that decode splits over the GPUs of a split prefill"),
    "enable_layernorm_sp": _no("sequence parallelism"),
    "enable_attn_tp_input_scattered": _no("an attention input that is scattered over GPUs"),
    "disable_attn_tp_gather": _no("models that scatter and gather their hidden states themselves"),
    "enable_pdmux": _no("prefill/decode multiplexing"),
    "enable_two_batch_overlap": _no("two-batch overlap"),
    # Speculative decoding
    "speculative_algorithm": _no(f"speculative decoding other than {' or '.join(SPECULATIVE)}", (None, *SPECULATIVE)),
    "speculative_eagle_topk": _no("drafts that branch into a tree, only chains (topk 1)", (None, 1)),
    "speculative_adaptive": _no("a number of draft steps that changes while serving"),
    "speculative_draft_attention_backend": _no("a draft model with another backend", (None, BACKEND_NAME)),
    "speculative_attention_mode": _no(
        "a phase that drafts are verified in (its one backend serves both)", ("prefill",), asked=True
    ),
    "speculative_draft_window_size": _DRAFT_WINDOW,
    "speculative_draft_sink_size": _DRAFT_WINDOW,
    "enable_multi_layer_eagle": _no("drafts by several next-token layers"),
    # Other masks and other answers
    "enable_mis": _no("multi-item scoring, which masks items from one another"),
    "dllm_algorithm": _no("diffusion language models", _UNSET),
    "enable_return_indexer_topk": _no("top-k indices in its answers"),
    "enable_deterministic_inference": _no("deterministic inference"),
    "rl_on_policy_target": _no("deterministic inference", _UNSET),
    # SGLang's own kernels
    "dsa_prefill_backend": Refused(_OWN_KERNELS, _UNSET, asked=True, advice=_choose("SPARSE_MLA")),
    "dsa_decode_backend": Refused(_OWN_KERNELS, _UNSET, asked=True, advice=_choose("SPARSE_MLA")),
    "dsa_topk_backend": Refused(_OWN_KERNELS, ("sgl-kernel",), asked=True, advice=_choose("TOPK")),
    "speculative_dsa_topk_backend": Refused(_OWN_KERNELS, ("sgl-kernel",), asked=True, advice=_choose("TOPK")),
    "dsa_paged_mqa_logits_backend": Refused(_OWN_KERNELS, ("auto",), asked=True, advice=_choose("MQA_LOGITS")),
    "dsa_triton_union": Refused(_OWN_KERNELS, (0,), asked=True),
    "enable_dsa_fused_indexer": Refused("has an indexer of its own", (None, False), asked=True),
    "enable_nvidia_megakernel": _no("decode by one kernel for the whole model"),
    "enable_amd_monokernel": _no("decode by one kernel for the whole model"),
    "enable_torch_compile": _no("torch.compile"),
    "cuda_graph_backend_decode": _no("this kind of CUDA graph for decode", (None, "full", "disabled"), asked=True),
    "cuda_graph_backend_prefill": _no(
        "this kind of CUDA graph for prefill", (None, "breakable", "disabled"), asked=True
    ),
    "model_impl": _no("models that SGLang does not implement itself", ("auto", "sglang")),
    # Weights that are elsewhere, or not there yet, when some of them are merged
    "weight_cache_mode": _no("weights that another process holds", ("off",)),
    "startup_weight_load_mode": _no("weights that are loaded after graphs were captured", ("serial",)),
    "offload_group_size": _no("weights that are fetched layer by layer", (-1,)),
    "rl_quant_profile": _no("FlashRL's loader", _UNSET),
    "remote_instance_weight_loader_start_seed_via_transfer_engine": _no(
        "other instances that read its weights where they first lay (some are merged afterwards)"
    ),
    # Hooks on modules
    "forward_hooks": _no(_HOOKED_MODULES, _UNSET),
    "debug_tensor_dump_output_folder": _no(_HOOKED_MODULES, _UNSET),
    "msprobe_dump_config": _no(_HOOKED_MODULES, _UNSET),
}

_WITHOUT = "Start without it"
_NVIDIA_DRAFTS = Refused("supports speculative decoding on NVIDIA GPUs only", _UNSET, advice=_WITHOUT)
_PINNED_LORA = "cannot serve LoRA where there is no pinned memory"
_NVIDIA_PREFILL_CP = "supports prefill context parallelism on NVIDIA GPUs only"
_NO_CONTEXT_PARALLEL: Mapping[str, Refused] = {
    "enable_prefill_cp": Refused(_NVIDIA_PREFILL_CP, advice=_WITHOUT),
    "enable_dsa_prefill_context_parallel": Refused(_NVIDIA_PREFILL_CP, advice=_WITHOUT),
    "attn_cp_size": Refused(_NVIDIA_PREFILL_CP, (1,), advice=_WITHOUT),
    "dcp_size": Refused("supports decode context parallelism on NVIDIA GPUs only", (1,), advice=_WITHOUT),
}
#: What a device changes in `REFUSED`.
ON_DEVICE: Mapping[str, Mapping[str, Refused]] = {
    "cuda": {},
    "rocm": {
        "speculative_algorithm": _NVIDIA_DRAFTS,
        # Here they also decide the layout of SGLang's fp8 rows, and these two ask for the one that we read.
        "dsa_prefill_backend": Refused(_OWN_KERNELS, (None, "tilelang", "aiter"), asked=True),
        "dsa_decode_backend": Refused(_OWN_KERNELS, (None, "tilelang", "aiter"), asked=True),
        "disaggregation_mode": _no("prefill/decode disaggregation", ("null",), advice=_WITHOUT),
        "enable_hierarchical_cache": _no(_HICACHE, advice=_WITHOUT),
        **_NO_CONTEXT_PARALLEL,
    },
    "cpu": {
        "speculative_algorithm": _NVIDIA_DRAFTS,
        "enable_lora": Refused(_PINNED_LORA, (None, False), advice=_WITHOUT),
        "lora_paths": Refused(_PINNED_LORA, _UNSET, advice=_WITHOUT),
        "enable_memory_saver": _no("memory that is given back while the server sleeps", advice=_WITHOUT),
        "cpu_offload_gb": _no("weights off the device", (0,), advice=_WITHOUT),
        "enable_hierarchical_cache": _no(_HICACHE, advice=_WITHOUT),
        # SGLang exchanges the ranks' tokens in pinned memory, by a Triton kernel and by collectives of GPUs.
        "enable_dp_attention": Refused("serves data-parallel attention on GPUs only", advice=_WITHOUT),
        **_NO_CONTEXT_PARALLEL,
    },
}

#: What a server of a disaggregated pair refuses beside `REFUSED`: it was never tried there.
IN_PAIRS: Mapping[str, Refused] = {
    "enable_dp_attention": _no("data-parallel attention between prefill and decode servers", advice=_WITHOUT),
    "pp_size": _no("pipeline parallelism between prefill and decode servers", (1,), advice=_WITHOUT),
    "enable_lora": _no("LoRA between prefill and decode servers", (None, False), advice=_WITHOUT),
    "lora_paths": _no("LoRA between prefill and decode servers", _UNSET, advice=_WITHOUT),
    "enable_memory_saver": _no("prefill and decode servers that sleep", advice=_WITHOUT),
    "enable_hierarchical_cache": _no("hierarchical cache of prefill and decode servers", advice=_WITHOUT),
}


def _beside(split: str) -> dict[str, Refused]:
    """What neither split of a context over GPUs was tried with."""
    return {
        "speculative_algorithm": _no(f"speculative decoding beside {split}", _UNSET),
        "dp_size": _no(f"data-parallel attention beside {split}", (1,), asked=True),
        "attn_dp_size": _no(f"data-parallel attention beside {split}", (1,), asked=True),
        "pp_size": _no(f"pipeline parallelism beside {split}", (1,)),
        "enable_lora": _no(f"LoRA beside {split}", (None, False)),
        "lora_paths": _no(f"LoRA beside {split}", _UNSET),
        "enable_hierarchical_cache": _no(f"hierarchical cache beside {split}"),
    }


_SPLIT_PREFILL = "a prefill that is split over GPUs"
#: What a server whose prefill is split over GPUs refuses beside `REFUSED`: it was never tried there.
WITH_PREFILL_CP: Mapping[str, Refused] = {
    "disaggregation_mode": _no("prefill and decode servers that split prefill over GPUs", ("null",), advice=_WITHOUT),
    "enable_mixed_chunk": _no(f"decode in the batches of {_SPLIT_PREFILL}"),
    **_beside(_SPLIT_PREFILL),
}

_SPLIT_CACHE = "a cache whose tokens are split over GPUs"
#: What a server with decode context parallelism refuses beside `REFUSED`: it was never tried there.
WITH_DECODE_CP: Mapping[str, Refused] = {
    "dcp_comm_backend": _no(
        "FlashInfer's exchange of partial answers",
        (None, "ag_rs", "a2a"),
        advice="Start with --dcp-comm-backend a2a or ag_rs",
    ),
    "dcp_replicate_q_proj": _no(
        f"projections of every GPU's queries on each beside {_SPLIT_CACHE}",
        (None, False),
        advice="Start with --no-dcp-replicate-q-proj",
    ),
    "disaggregation_mode": _no("prefill and decode servers that split a cache's tokens", ("null",), advice=_WITHOUT),
    "enable_prefill_cp": _no(f"a split prefill beside {_SPLIT_CACHE}"),
    "enable_dsa_prefill_context_parallel": _no(f"a split prefill beside {_SPLIT_CACHE}"),
    # SGLang takes every GPU's part of the prefixes for equally long, which those of decoding requests are not.
    "enable_mixed_chunk": _no(f"decode in the batches of a prefill beside {_SPLIT_CACHE}"),
    "enable_memory_saver": _no(f"memory that is given back while the server sleeps beside {_SPLIT_CACHE}"),
    **_beside(_SPLIT_CACHE),
}

#: Arguments that concern attention and are taken with any value; some are checked elsewhere with the model at hand.
SERVED: frozenset[str] = frozenset(
    _names("""
    attention_backend decode_attention_backend prefill_attention_backend device page_size kv_cache_dtype dtype
    model_path quantization torchao_config json_model_override_args context_length load_format
    tp_size dp_size attn_dp_size enable_dp_attention pp_size
    enable_prefill_cp enable_dsa_prefill_context_parallel attn_cp_size
    dcp_size dcp_comm_backend dcp_replicate_q_proj
    disaggregation_mode disaggregation_bootstrap_port disaggregation_ib_device num_reserved_decode_tokens
    disaggregation_decode_extra_slots disaggregation_decode_polling_interval
    speculative_num_steps speculative_num_draft_tokens speculative_draft_model_path
    chunked_prefill_size enable_mixed_chunk disable_chunked_prefix_cache disable_radix_cache disable_overlap_schedule
    cuda_graph_config cuda_graph_max_bs_decode cuda_graph_max_bs_prefill cuda_graph_bs_decode cuda_graph_bs_prefill
    cuda_graph_max_seq_len_prefill cuda_graph_prefill_max_context disable_cuda_graph disable_decode_cuda_graph
    disable_prefill_cuda_graph disable_cuda_graph_padding debug_cuda_graph
    enable_lora enable_lora_overlap_loading lora_paths lora_target_modules max_lora_rank max_loras_per_batch
    max_loaded_loras lora_eviction_policy lora_backend max_lora_chunk_size lora_strict_loading lora_drain_wait_threshold
    lora_use_virtual_experts experts_shared_outer_loras
    enable_memory_saver enable_weights_cpu_backup enable_draft_weights_cpu_backup cpu_offload_gb
    enable_hierarchical_cache
    hicache_ratio hicache_size hicache_write_policy hicache_io_backend hicache_mem_layout
    hicache_storage_prefetch_policy hicache_storage_backend_extra_config hicache_host_memory_mode
    hicache_host_memory_fraction hicache_storage_prefetch_retry_poll_interval
    hicache_storage_prefetch_retry_max_attempts
    """)
)

#: Arguments that do not concern attention, by what they do concern.
NO_CONCERN: Mapping[str, str] = {
    "options of what is refused": """
    lmcache_config_file flexkv_config_file unified_cache_external_linker_backend unified_cache_external_linker_config
    hisparse_config kv_canary_real_data kv_canary_sweep_interval
    decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank spec_trace_dir
    prefill_cp_mode
    enable_megamoe_for_layernorm_sp enable_dynamic_chunking pp_max_micro_batch_size pp_async_batch_depth
    pdmux_config_path sm_group_num tbo_token_distribution_threshold
    speculative_adaptive_config speculative_dflash_block_size speculative_dspark_block_size
    speculative_dspark_sps_table_path speculative_dspark_confidence_sts_path
    speculative_dspark_align_verify_tokens_to_graph_tier speculative_domino_candidate_pool_size
    speculative_ngram_min_bfs_breadth speculative_ngram_max_bfs_breadth speculative_ngram_match_type
    speculative_ngram_max_trie_depth speculative_ngram_capacity speculative_ngram_external_corpus_path
    speculative_ngram_external_sam_budget speculative_ngram_external_corpus_max_tokens uno_lora_path
    dllm_algorithm_config dllm_fdfo enable_torch_compile_debug_mode torch_compile_max_bs cuda_graph_tc_compiler
    weight_cache_socket weight_cache_timeout offload_num_in_group offload_prefetch_step offload_mode
    debug_tensor_dump_layers debug_tensor_dump_input_file
    """,
    "the draft model beside its attention": """
    speculative_draft_model_revision speculative_draft_load_format speculative_draft_model_quantization
    _speculative_draft_quantization_explicitly_set speculative_accept_threshold_single
    speculative_accept_threshold_acc speculative_use_rejection_sampling speculative_use_block_verification
    speculative_token_map speculative_moe_runner_backend speculative_moe_a2a_backend speculative_skip_dp_mlp_sync
    speculative_boundary_reduction speculative_enable_w4a4_mxfp4_megamoe
    """,
    "other attention backends, models and devices": """
    triton_attention_reduce_in_fp32 triton_attention_num_kv_splits triton_attention_split_tile_size
    flashinfer_mla_disable_ragged enable_lean_attention dsv4_prefill_backend dsv4_attn_backend qsa_indexer_dtype
    enable_deepseek_v4_fp4_indexer mm_attention_backend enable_fused_qk_norm_rope enable_scattered_sconv
    enable_encoder_swa_bounded_replay enable_decoder_swa_bounded_replay swa_full_tokens_ratio
    _swa_full_tokens_ratio_explicitly_set swa_prefix_tails disable_hybrid_swa_memory
    mamba_backend max_mamba_cache_size mamba_ssm_dtype mamba_max_states_per_path mamba_full_memory_ratio
    enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds mamba_radix_cache_strategy
    uses_mamba_radix_cache mamba_track_interval enable_int8_mamba_checkpoint int8_mamba_ckpt_size
    linear_attn_backend linear_attn_decode_backend linear_attn_prefill_backend linear_attn_verify_backend
    enable_linear_replayssm linear_replayssm_cache_len enable_linear_replayssm_spec
    ple_offload_embedding ple_offload_backend ple_offload_dir c128_page_size mlx_enable_sampling
    """,
    "experts and other layers": """
    ep_size moe_dp_size dwdp_size moe_a2a_backend moe_runner_backend moe_dense_tp_size deepep_mode deepep_v2_mode
    deepep_config deepep_dispatcher_output_dtype flashinfer_a2a_dispatch_type flashinfer_mxfp4_moe_precision
    fuseep_mode ep_num_redundant_experts ep_dispatch_algorithm init_expert_location enable_eplb eplb_algorithm
    eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk eplb_min_rebalancing_utilization_threshold
    expert_distribution_recorder_mode expert_distribution_recorder_buffer_size enable_expert_distribution_metrics
    expert_balancedness_report_mode elastic_ep_backend elastic_ep_initial_size elastic_ep_scale_timeout
    elastic_ep_rejoin enable_elastic_expert_backup ep_join_mode ep_join_rank_offset max_ep_size mooncake_ib_device
    enable_waterfill disable_flashinfer_cutlass_moe_fp4_allgather disable_shared_experts_fusion
    enforce_shared_experts_fusion enable_shared_experts_attn_tp shared_experts_tp_size enable_dense_mlp_attn_tp
    enable_w4a4_mxfp4_megamoe enable_fused_moe_sum_all_reduce enable_paged_experts paged_experts_num_resident
    enable_single_batch_overlap kt_weight_path kt_method kt_cpuinfer kt_threadpool_count kt_num_gpu_experts
    kt_max_deferred_experts_per_token enable_return_routed_experts
    fp8_gemm_runner_backend fp4_gemm_runner_backend bf16_gemm_backend enable_tf32_matmul enable_fp32_lm_head
    enable_dp_lm_head enable_tp_lm_head_all_to_all disable_flashinfer_autotune flashinfer_autotune_skip_ops
    """,
    "communication": """
    nccl_port dist_timeout dist_init_addr nnodes node_rank enable_nccl_nvls enable_symm_mem disable_custom_all_reduce
    enable_mscclpp enable_torch_symm_mem pre_warm_nccl enable_quant_communications enable_flashinfer_allreduce_fusion
    enforce_disable_flashinfer_allreduce_fusion flashinfer_allreduce_fusion_backend enable_aiter_allreduce_fusion
    disable_aiter_allreduce_fusion_in_prefill disable_aiter_allreduce_fusion_in_decode boundary_reduction
    enable_p2p_check enable_dp_attention_local_control_broadcast
    """,
    "scheduling and memory": """
    mem_fraction_static max_running_requests max_queued_requests max_total_tokens max_prefill_tokens
    prefill_max_requests schedule_policy enable_priority_scheduling disable_priority_preemption
    default_priority_value abort_on_priority_when_disabled schedule_low_priority_values_first
    priority_scheduling_preemption_threshold retraction_policy schedule_conservativeness radix_eviction_policy
    _radix_eviction_policy_explicitly_set radix_eviction_policy_config num_continuous_decode_steps
    scheduler_recv_interval load_balance_method enable_prefill_delayer prefill_delayer_max_delay_passes
    prefill_delayer_token_usage_low_watermark prefill_delayer_forward_passes_buckets
    prefill_delayer_wait_seconds_buckets prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms
    min_free_slots_delay prefill_decode_interval prefill_decode_interval_min_bs enable_cudagraph_gc gc_threshold
    base_gpu_id gpu_id_step numa_node random_seed sleep_on_idle strip_thinking_cache
    """,
    "loading": """
    model_loader_extra_config trust_remote_code revision model_config_parser is_embedding modelopt_quant
    modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path quantize_and_serve
    custom_weight_loader weight_loader_disable_mmap weight_loader_prefetch_checkpoints
    weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load
    remote_instance_weight_loader_seed_instance_ip remote_instance_weight_loader_seed_instance_service_port
    remote_instance_weight_loader_send_weights_group_ports remote_instance_weight_loader_backend
    engine_info_bootstrap_port modelexpress_config download_dir model_checksum delete_ckpt_after_loading
    decrypted_config_file decrypted_draft_config_file checkpoint_engine_wait_weights_before_ready weight_version
    """,
    "tokens in and out": """
    tokenizer_path tokenizer_mode tokenizer_backend tokenizer_worker_num detokenizer_worker_num skip_tokenizer_init
    chat_template hf_chat_template_name completion_template default_chat_template_kwargs trust_request_chat_template
    reasoning_parser enable_strict_thinking tool_call_parser tool_server sampling_backend sampling_defaults
    preferred_sampling_params sampling_mask_max_tokens grammar_backend constrained_json_whitespace_pattern
    constrained_json_disable_any_whitespace constrained_json_max_whitespace_cnt disable_outlines_disk_cache
    allow_auto_truncate stream_interval batch_notify_size stream_response_default_include_usage
    incremental_streaming_output enable_custom_logit_processor enable_return_hidden_states return_hidden_states_mode
    enable_return_aux_hidden_states aux_hidden_state_capture return_aux_hidden_state_layer_ids return_input_ids
    return_output_ids enable_dynamic_batch_tokenizer dynamic_batch_tokenizer_batch_size
    dynamic_batch_tokenizer_batch_timeout enable_tokenizer_batch_encode disable_tokenizer_batch_decode
    enable_watermark watermark_config watermark_key watermark_key_b watermark_context_window
    watermark_mixing_probability watermark_max_probability watermark_default_enabled watermark_enforce_all
    """,
    "images and sound": """
    enable_multimodal enable_broadcast_mm_inputs_process enable_prefix_mm_cache mm_enable_dp_encoder mm_process_config
    mm_processor_worker_num mm_io_worker_num limit_mm_data_per_request enable_mm_global_cache mm_global_cache_backend
    disable_fast_image_processor image_processor_backend mm_feature_transport keep_mm_feature_on_device
    mm_preprocess_cache_size_mb trust_mm_content_hashes allowed_media_domains media_url_max_file_size_mb encoder_only
    language_only language_model_only encoder_transfer_backend encoder_urls encoder_bootstrap_port
    encoder_register_urls enable_adaptive_dispatch_to_encoder enable_precise_embedding_interpolation
    asr_max_buffer_seconds asr_max_concurrent_sessions
    """,
    "the server": """
    host port fastapi_root_path smg_grpc_mode grpc_mode grpc_port grpc_worker_threads grpc_response_timeout_secs
    smg_http_sidecar_port sidecar sidecar_args skip_server_warmup warmups enable_http2 http2_max_concurrent_streams
    http2_initial_connection_window_size enable_http_worker_reuseport ssl_keyfile ssl_certfile ssl_ca_certs
    ssl_keyfile_password enable_ssl_refresh api_key admin_api_key served_model_name file_storage_path
    enable_cache_report enable_response_store gated_launch_port use_ray custom_sigquit_handler watchdog_timeout
    soft_watchdog_timeout
    """,
    "logs and metrics": """
    log_level log_level_http log_requests log_requests_level log_requests_format log_requests_target
    uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost enable_metrics enable_mfu_metrics
    enable_metrics_for_all_schedulers load_snapshot_publish_interval load_publish_endpoint
    tokenizer_metrics_custom_labels_header tokenizer_metrics_allowed_custom_labels extra_metric_labels
    bucket_time_to_first_token bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets
    generation_tokens_buckets gc_warning_threshold_secs decode_log_interval enable_request_time_stats_logging
    kv_events_config enable_forward_pass_metrics forward_pass_metrics_worker_id forward_pass_metrics_ipc_name
    enable_trace trace_modules otlp_traces_endpoint otlp_service_name export_metrics_to_file
    export_metrics_to_file_dir stat_loggers enable_profile_cuda_graph enable_layerwise_nvtx_marker
    """,
}

OFF = ("", "false", "0", "no", "n")
_ON = ("", "true", "1", "yes", "y")
_FUSED_TOPK = Refused("selects tokens as physical slots", _ON, advice="Unset it")
_HIP_PRESHUFFLE = Refused(
    "has a layout of its own choice on ROCm", OFF, advice="Unset it: NSA_PLUGIN_INDEX_LAYOUT=row_major is its like"
)
_STOCK_SWITCH = Refused("does not run the kernels that it switches", OFF, advice="Unset it")

#: Environment variables of SGLang's DSA path that are refused with any (lower-case) value but `served`.
REFUSED_VARIABLES: Mapping[str, Refused] = {
    "SGLANG_DSA_FUSE_TOPK": _FUSED_TOPK,
    "SGLANG_NSA_FUSE_TOPK": _FUSED_TOPK,
    "SGLANG_DSA_TOPK_BROADCAST": Refused("does not broadcast one GPU's top-k to the others", OFF, advice="Unset it"),
    "SGLANG_DSA_TOPK_FLASHINFER_TIE_BREAK": Refused(_STOCK_SWITCH.why, ("",), advice="Unset it"),
    "SGLANG_DSA_TRITON_PREFILL": Refused(_STOCK_SWITCH.why, ("",), advice="Unset it"),
    "SGLANG_DSA_HIP_DISABLE_PRESHUFFLE": _HIP_PRESHUFFLE,
    "SGLANG_NSA_HIP_DISABLE_PRESHUFFLE": _HIP_PRESHUFFLE,
    **dict.fromkeys(
        _names("""
        SGLANG_DSA_TOPK_FLASHINFER_DETERMINISTIC SGLANG_DISABLE_DSA_INDEXER_FUSION SGLANG_ENABLE_DSA_Q8KV8_BORN_FP8_Q
        SGLANG_ENABLE_DSA_Q8KV8_TOPK_LENGTH SGLANG_ENABLE_DSA_Q8KV8_QPREP_OVERLAP
        SGLANG_ENABLE_DSA_Q8KV8_KV_CAT_FUSION
        """),
        _STOCK_SWITCH,
    ),
}
#: Those that are taken: stock's dense prefill and its indexer's memory, which serve under nsa_plugin too, kernels that
#: would not run anyway, and pooled index keys, which are refused by the model's configuration.
OTHER_VARIABLES: frozenset[str] = frozenset(
    _names("""
    SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD SGLANG_NSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD
    SGLANG_DSA_MQA_LOGITS_FREE_MEM_FRACTION SGLANG_DISABLE_AITER_FUSED_FP8_DSA_INDEXER
    SGLANG_EXPERIMENTAL_DSA_KPOOL_METADATA_FUSION SGLANG_DSA_KPOOL_DEBUG_BOUNDS
    """)
)

#: What SGLang calls an MLA model, by why it is not served; "" is served.
_ARCHITECTURES: Mapping[str, str] = {
    "": """
    DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV3ForCausalLMNextN DeepseekV32ForCausalLM GlmMoeDsaForCausalLM
    Glm4MoeLiteForCausalLM LongcatFlashForCausalLM KimiK25ForConditionalGeneration KimiVLForConditionalGeneration
    DotsVLMForCausalLM MistralLarge3ForCausalLM PixtralForConditionalGeneration GlmMoeDsaForCausalLMNextN
    """,
    "is a draft model that was never run with nsa_plugin": """
    Glm4MoeLiteForCausalLMNextN LongcatFlashForCausalLMNextN MistralLarge3ForCausalLMEagle
    Glm5NextForConditionalGenerationNextN
    """,
    "mixes MLA with layers of linear attention": """
    KimiLinearForCausalLM KimiK3LinearForCausalLM KimiK3ForConditionalGeneration BailingMoeV2_5ForCausalLM
    BailingMoeForCausalLMNextN BailingMoeV3ForCausalLM BailingMoeV3VLForConditionalGeneration
    GigaChat35ForCausalLM GigaChat35ForCausalLMNextN Glm5NextForConditionalGeneration
    """,
    "has a learnable attention sink and a gate": "HYV4ForCausalLM HYV4ForCausalLMNextN",
    "has gates, and layers that see a window only": "Dots3NoteForCausalLM Dots3NoteForCausalLMNextN",
    "has an attention module of its own, which nsa_plugin was never tried with": "SarvamMLAForCausalLM",
    "is a draft model that is not the model's own next-token layer": "Eagle3DeepseekV2ForCausalLM",
    "was never run with nsa_plugin": "DeepseekVL2ForCausalLM",
    "has narrower latents, and was never run with nsa_plugin": "MiniCPM3ForCausalLM",
}
#: Why an architecture is not served; "" is served. What is not listed is refused.
ARCHITECTURES: Mapping[str, str] = {name: reason for reason, names in _ARCHITECTURES.items() for name in names.split()}
#: Those that were run with an indexer: SGLang takes one in more of them.
INDEXED: frozenset[str] = frozenset(
    _names("DeepseekV32ForCausalLM DeepseekV3ForCausalLMNextN GlmMoeDsaForCausalLM GlmMoeDsaForCausalLMNextN")
)
#: Those whose own next-token layer was run as their draft.
DRAFTED: frozenset[str] = frozenset(_names("DeepseekV3ForCausalLM DeepseekV32ForCausalLM GlmMoeDsaForCausalLM"))


def classified(name: str) -> bool:
    """Whether an argument of SGLang's servers is in one of the classes."""
    return name in REFUSED or name in SERVED or any(name in _names(names) for names in NO_CONCERN.values())
