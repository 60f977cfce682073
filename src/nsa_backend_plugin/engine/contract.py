"""What we read of SGLang's objects, as types, and where SGLang defines it.

SGLang promises none of these attributes. `missing` looks for them in a release's source, so that a renamed one is found
before a server meets it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from nsa_backend_plugin.engine import release


class ForwardBatch(Protocol):
    """One batch of the model: tensors of its requests, and of its tokens."""

    forward_mode: Any
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    extend_seq_lens: torch.Tensor
    req_pool_indices: torch.Tensor
    positions: torch.Tensor
    out_cache_loc: torch.Tensor
    reuse_dsa_topk_indices: bool | None
    attn_dcp_metadata: Any


class GatheredContext(Protocol):
    """What decode context parallelism gathers of a prefill's contexts: rows of a layer, and the place of each token."""

    dcp_kv_buffer: torch.Tensor
    dcp_kv_indices: torch.Tensor


class ModelRunner(Protocol):
    """What the factory gets."""

    server_args: Any
    model_config: Any
    model: torch.nn.Module
    device: str
    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    req_to_token_pool: Any
    token_to_kv_pool: Any


class AttentionLayer(Protocol):
    layer_id: int
    tp_q_head_num: int
    head_dim: int
    v_head_dim: int
    scaling: float


class ModelConfig(Protocol):
    hf_config: Any
    hf_text_config: Any
    attention_arch: Any
    kv_lora_rank: int
    qk_rope_head_dim: int
    vocab_size: int


class TokenizerManager(Protocol):
    server_args: Any
    model_config: Any


class Indexer(Protocol):
    n_heads: int
    head_dim: int
    index_topk: int
    wq_b: torch.nn.Module
    k_norm: torch.nn.Module
    rotary_emb: Any
    scale_fmt: str | None
    softmax_scale: float


#: Each type's class in SGLang. An attribute that a base class or another object sets is not asked for.
CLASSES: Mapping[type, str] = {
    ForwardBatch: "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
    GatheredContext: "sglang.srt.layers.dcp.metadata.DecodeContextParallelMetadata",
    ModelRunner: "sglang.srt.model_executor.model_runner.ModelRunner",
    AttentionLayer: "sglang.srt.layers.radix_attention.RadixAttention",
    ModelConfig: "sglang.srt.configs.model_config.ModelConfig",
    TokenizerManager: "sglang.srt.managers.tokenizer_manager.TokenizerManager",
    Indexer: "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer",
}


def missing(package: Path | None = None) -> Iterator[str]:
    """Dotted names of attributes that we read and a release does not set. package: its folder; None: the installed."""
    for protocol, target in CLASSES.items():
        found = release.attributes(target, package)
        yield from (f"{target}.{name}" for name in protocol.__annotations__ if name not in found)
