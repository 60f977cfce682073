"""GPU backend for MLA models without an indexer (DeepSeek-V2/V3/R1, Kimi-K2) on Hopper.

Prefill, metadata and graph capture are SGLang's FlashAttention-3 backend; decode runs `ops.dense_mla`, which takes
any head count without padding.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

from nsa_backend_plugin.ops import concat, dense_mla


class NsaPluginMLABackend(FlashAttentionBackend):
    """Dense MLA decode through `ops.dense_mla`."""

    #: Whose choice of MHA or absorbed MLA fits: the backend that prefills (read by the hook `forward_method`).
    forward_method_like = "fa3"

    def __init__(self, runner: Any):
        super().__init__(runner)
        if runner.page_size not in dense_mla.PAGE_SIZES:
            raise ValueError(
                f"--page-size {runner.page_size}: nsa_plugin serves MLA models with page size "
                f"{', '.join(map(str, dense_mla.PAGE_SIZES))}"
            )
        self.decode_workspace: torch.Tensor | None = None

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        scratch = dense_mla.workspace_bytes(max_bs, 128, self.device)
        self.decode_workspace = torch.zeros(scratch, dtype=torch.uint8, device=self.device)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if k is not None and save_kv_cache:
            self.token_to_kv_pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, k_rope)
        heads = layer.tp_q_head_num
        if q_rope is None:
            q_all = q.contiguous().view(-1, heads, layer.head_dim)
        else:
            q_nope = q.view(-1, heads, layer.v_head_dim)
            q_all = concat.q_all(q_nope, q_rope.view(-1, heads, layer.head_dim - layer.v_head_dim))
        metadata = self.forward_metadata
        out = q_all.new_empty(q_all.shape[0], heads, layer.v_head_dim)
        dense_mla.decode(
            q_all,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            metadata.page_table,
            metadata.cache_seqlens_int32,
            layer.scaling,
            page_size=self.page_size,
            value_dim=layer.v_head_dim,
            out=out,
            workspace=self.decode_workspace if torch.cuda.is_current_stream_capturing() else None,
        )
        return out.view(-1, heads * layer.v_head_dim)
