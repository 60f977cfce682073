"""Attention backend on CPU, for MLA and DSA models: absorbed attention through the operations.

Decode, extend, chunked and mixed batches are the same computation on one row per token (`metadata.token_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from nsa_backend_plugin.engine import contract, query, unknown
from nsa_backend_plugin.engine.cpu.metadata import token_rows
from nsa_backend_plugin.engine.indexer import Rows
from nsa_backend_plugin.engine.latent_rows import plain_fp8_scale
from nsa_backend_plugin.ops import dense_mla, latent_cache, sparse_mla


class NsaPluginCpuBackend(AttentionBackend):
    use_mha = False  # read by SGLang's choice of the forward method: always the absorbed one

    def __init__(self, runner: contract.ModelRunner):
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.kv_cache_dtype = runner.kv_cache_dtype
        self.data_type = runner.kv_cache_dtype
        self.page_size: int = self.token_to_kv_pool.page_size
        self._position_scaling = query.PositionScaling(runner.model_config)
        self._rows: Rows | None = None

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self._rows = token_rows(forward_batch, self.req_to_token_pool.req_to_token, self.page_size)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """No graphs on CPU: nothing to allocate."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def support_triton(self) -> bool:
        return False

    def indexer_rows(self, forward_batch: Any) -> Rows:
        assert self._rows is not None, "init_forward_metadata was not called"
        return self._rows

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
        topk_indices: torch.Tensor | None = None,
        **keywords: Any,
    ) -> torch.Tensor:
        """Absorbed attention of rotated queries [T, heads*512] and q_rope [T, heads, 64]; returns [T, heads*512].

        k [T, 1, 512] and k_rope [T, 1, 64] are this batch's latent rows, normalized and rotated by the model.
        topk_indices: physical slots [T, K] of a DSA model; None attends to the whole context.
        """
        unknown.refuse("the attention backend", keywords)
        if q_rope is None or k_rope is None:
            raise ValueError(
                "nsa_plugin got queries that are concatenated already: FORWARD_ABSORB_CORE_ATTENTION_BACKENDS lacks it"
            )
        kv = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        if save_kv_cache:
            slots = forward_batch.out_cache_loc
            latent, rope = k.view(len(slots), -1), k_rope.reshape(len(slots), -1)
            latent_cache.store(latent, rope, kv, slots, kv_scale=plain_fp8_scale(kv))
        q_all = self._position_scaling(query.absorbed(q, q_rope, layer), forward_batch.positions)
        out = q_all.new_empty(*q_all.shape[:2], layer.v_head_dim)
        if topk_indices is not None:
            sparse_mla.attend(q_all, kv, topk_indices, layer.scaling, value_dim=layer.v_head_dim, out=out)
        else:
            rows = self.indexer_rows(forward_batch)
            dense_mla.decode(
                q_all,
                kv,
                rows.block_table(),
                rows.lengths,
                layer.scaling,
                page_size=self.page_size,
                kv_scale=plain_fp8_scale(kv),
                value_dim=layer.v_head_dim,
                out=out,
            )
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    forward_extend = forward_decode
