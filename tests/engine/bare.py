"""What stands in for a served model on a CPU: our backend with enough for SGLang's metadata, an indexer, its pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import index_cache
from nsa_backend_plugin.engine.gpu import shards
from nsa_backend_plugin.layouts import index_page_bytes


def index_pages(count: int) -> torch.Tensor:
    """Live pages: keys of any bits, scales that are finite."""
    pages = torch.randint(0, 120, (count, index_page_bytes()), dtype=torch.uint8)
    for page in pages:
        page[64 * 128 :] = (torch.rand(64) * 0.02 + 0.005).view(torch.uint8)
    return pages


def indexer(cos_sin: torch.Tensor, heads: int, topk: int) -> SimpleNamespace:
    return SimpleNamespace(
        layer_id=0,
        n_heads=heads,
        index_topk=topk,
        softmax_scale=1.0,
        use_dsa_indexer_fusion=False,
        scale_fmt=None,
        rotary_emb=SimpleNamespace(cos_sin_cache=cos_sin, is_neox_style=True),
        _mask_init_and_local_tokens=lambda logits, lengths, starts=None: logits,
    )


def model(**entries: Any) -> SimpleNamespace:
    """The configuration of one with an indexer, where it has entries, or of one without."""
    plain = {"index_topk": None, "num_hidden_layers": 4}
    name = "DeepseekV32ForCausalLM" if entries else "DeepseekV3ForCausalLM"
    return SimpleNamespace(hf_config=SimpleNamespace(architectures=[name], **{**plain, **entries}))


def batch(mode: Any, before: list[int], new: list[int], lengths: torch.Tensor, **more: Any) -> SimpleNamespace:
    """SGLang's, of requests with tokens in the cache and new ones; lengths: what SGLang passes beside these."""
    made = SimpleNamespace(
        forward_mode=mode,
        input_ids=torch.zeros(sum(new), dtype=torch.int64),
        batch_size=len(new),
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        seq_lens_sum=int(lengths.sum()),
        req_pool_indices=torch.arange(len(new)),
        spec_info=None,
        extend_prefix_lens=torch.tensor(before),
        extend_prefix_lens_cpu=before,
        extend_seq_lens=torch.tensor(new, dtype=torch.int32),
        extend_seq_lens_cpu=new,
        extend_num_tokens=sum(new),
        global_num_tokens_cpu=None,
        attn_cp_metadata=None,
        reuse_dsa_topk_indices=False,
    )
    vars(made).update(more)
    return made


def backend(kind: type, table: torch.Tensor, pages: torch.Tensor, topk: int, **pool: Any) -> Any:
    """Of a class of ours. table [requests, tokens] int32: slots; pool: more of the KV pool than its index keys."""
    made = object.__new__(kind)
    made.device, made.share = torch.device("cpu"), shards.Share(1, 0)
    made.req_to_token = table
    made.req_to_token_pool = SimpleNamespace(req_to_token=table)
    made.token_to_kv_pool = SimpleNamespace(page_size=64, get_index_k_with_scale_buffer=lambda layer_id: pages, **pool)
    index_cache.declare_layout(made.token_to_kv_pool, "row_major")
    made.real_page_size = made.physical_page_size = 64
    made.dsa_index_topk, made.dsa_index_kpool = topk, 1
    made.dsa_decode_impl = made.dsa_prefill_impl = BACKEND_NAME
    made.enable_auto_select_prefill_impl = made.dsa_kv_cache_store_fp8 = False
    made.speculative_num_draft_tokens = made._kv_shard_pool = None
    made.set_dsa_prefill_impl = lambda forward_batch=None: None  # asks for the GPU
    made.use_mha, made.use_fused_topk, made.hisparse_coordinator = False, True, None
    made._arange_buf = torch.arange(256, dtype=torch.int32)
    made.dsa_topk_backend = SimpleNamespace(should_use_topk_v2=lambda: False)
    return made
