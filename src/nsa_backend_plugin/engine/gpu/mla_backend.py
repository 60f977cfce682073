"""GPU backend for MLA models without an indexer (DeepSeek-V2/V3/R1, Kimi-K2) on Hopper.

Prefill, the verification of drafts, metadata and graph capture are SGLang's FlashAttention-3 backend; decode runs
`ops.dense_mla`, which takes any head count without padding.

Over fp8 rows prefill computes in the model's dtype: dense prefill reads what it needs of the cache widened, and
absorbed prefill (a short cached prefix) a widened copy of the batch's own pages. With decode context parallelism
(`shards`) absorbed prefill reads what the model gathers of the other GPUs, decode this GPU's tokens.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend, FlashAttentionMultiStepBackend
from sglang.srt.runtime_context import get_parallel

from nsa_backend_plugin.engine import contract, latent_rows, query, unknown
from nsa_backend_plugin.engine.gpu import prefill, scratch, shards
from nsa_backend_plugin.ops import dense_mla
from nsa_backend_plugin.ops.call import Step


class NsaPluginMLABackend(FlashAttentionBackend):
    """Dense MLA decode through `ops.dense_mla`."""

    #: Whose choice of MHA or absorbed MLA fits: the backend that prefills (read by the hook `forward_method`).
    forward_method_like = "fa3"
    #: Read by the hook `prefill_key`.
    joins_prefill_keys = True
    #: SGLang's pool starts as zeros, and holds keys of older requests later: in fp8 NaN for what was too large.
    kv_is_finite = True
    #: SGLang's; exchanged while it prefills over other rows than the pool's.
    token_to_kv_pool: Any
    forward_metadata: Any
    page_size: int

    def __init__(self, runner: Any, **speculative: Any):
        """speculative: what SGLang passes to the backends of a draft model (step, number of steps ...)."""
        super().__init__(runner, **speculative)
        if runner.page_size not in dense_mla.PAGE_SIZES:
            raise ValueError(
                f"--page-size {runner.page_size}: nsa_plugin serves MLA models with page size "
                f"{', '.join(map(str, dense_mla.PAGE_SIZES))}"
            )
        latent_rows.check_plain(runner.kv_cache_dtype, runner.dtype, "cuda")
        self.rows_are_fp8 = runner.kv_cache_dtype != runner.dtype
        latent_rows.check_drafts(self.rows_are_fp8, runner.server_args.speculative_algorithm)
        # SGLang reads it in prefill alone, where any other value quantizes queries and new keys to fp8 too.
        self.kv_cache_dtype_str = "auto"
        self.position_scaling = query.PositionScaling(runner.model_config)
        self.share = shards.Share.of(get_parallel())
        #: Of a decode step: with those that the other GPUs of its group project.
        self.num_q_heads = runner.model_config.num_attention_heads // get_parallel().attn_tp_size * self.share.size
        if runner.dtype == torch.bfloat16:  # what SGLang reads the cached prefix as when it finds this attribute
            self.pack_prefix_chunk_kv = prefill.pack_chunk
        self.decode_workspace: torch.Tensor | None = None
        self.step = Step()
        if runner.server_args.enable_memory_saver:  # memory that was given back comes back with anything in it
            self.kv_is_finite = False

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.decode_workspace = scratch.reserve("dense attention", self._workspace_bytes(max_bs), self.device)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.step = Step()
        super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.step = Step()
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def draft_backend(self, factory: Any, per_step: bool) -> Any:
        """Backend of the draft model that SGLang's factory asks for, by the hook `draft_backends`."""
        runner = factory.draft_model_runner
        if per_step:
            return NsaPluginMLADraftSteps(runner, factory.topk, factory.speculative_num_steps)
        return NsaPluginMLABackend(runner)

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
        **keywords: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The answer [B, heads*512]; with decode context parallelism also its lse (`shards.answer`)."""
        unknown.refuse("the attention backend", keywords)
        if k is not None and save_kv_cache:
            self.token_to_kv_pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, k_rope)
        q_all = self.position_scaling(query.absorbed(q, q_rope, layer), forward_batch.positions)
        kv = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        kv_scale = latent_rows.plain_fp8_scale(kv)
        table, lengths = self._contexts()
        out = dense_mla.decode(
            q_all,
            kv,
            table,
            lengths,
            layer.scaling,
            page_size=self.page_size,
            kv_scale=kv_scale,
            value_dim=layer.v_head_dim,
            rows_have_keys=self.share.rank == 0,  # SGLang pads batches with lengths of 1
            kv_is_finite=self.kv_is_finite and kv_scale is None,
            return_lse=self.share.is_partial,
            workspace=self._workspace(q_all.shape[0]),
            step=self.step,
        )
        if self.share.is_partial:
            return shards.answer(*out)
        assert isinstance(out, torch.Tensor)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        **keywords: Any,
    ) -> Any:
        """SGLang's own, of scaled queries: dense multi-head prefill, or absorbed where q_rope is given."""
        q = self.position_scaling(q, forward_batch.positions)
        if q_rope is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **keywords)
        q_rope = self.position_scaling(q_rope, forward_batch.positions)
        if not (self.rows_are_fp8 or self.share.is_partial):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, q_rope=q_rope, **keywords)
        if save_kv_cache:
            self.token_to_kv_pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, keywords["k_rope"])
        context = self._gathered(forward_batch) if self.share.is_partial else self._own(layer, forward_batch)
        with self._reading(*context, q.dtype):
            return super().forward_extend(q, k, v, layer, forward_batch, False, q_rope=q_rope, **keywords)

    def _contexts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(page table, lengths) of what this GPU has of the contexts of a decode step."""
        whole = self.forward_metadata.page_table, self.forward_metadata.cache_seqlens_int32
        if not self.share.is_partial:
            return whole

        def share() -> tuple[torch.Tensor, torch.Tensor]:
            return self.share.page_table(whole[0]), self.share.lengths(whole[1])

        return self.step.once("this GPU's share of the contexts", share, *whole)

    def _own(self, layer: Any, forward_batch: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(rows, page table, page size) of a copy of the batch's own pages."""
        table = self.forward_metadata.page_table
        find = functools.partial(_own_pages, table, forward_batch.seq_lens_cpu, self.page_size)
        pages, renumbered = self.step.once("pages of the context", find, table)
        kv = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        # As bytes: torch does not index fp8 on every device.
        rows = kv.view(torch.uint8).view(-1, self.page_size * kv.shape[-1])[pages]
        return rows.view(kv.dtype).view(-1, *kv.shape[1:]), renumbered, self.page_size

    def _gathered(self, forward_batch: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(rows, page table, page size) of what the model gathered of every GPU of the group for this layer."""
        gathered: contract.GatheredContext = forward_batch.attn_dcp_metadata
        places = gathered.dcp_kv_indices
        fill = functools.partial(_table_of_rows, places, forward_batch.seq_lens_cpu)
        return gathered.dcp_kv_buffer, self.step.once("places of the context", fill, places), 1

    @contextlib.contextmanager
    def _reading(self, rows: torch.Tensor, table: torch.Tensor, page_size: int, dtype: torch.dtype) -> Iterator[None]:
        """Within it, SGLang's absorbed prefill reads these rows, which it would widen itself, in place of the pool."""
        kept = self.token_to_kv_pool, self.forward_metadata, self.page_size
        self.token_to_kv_pool, self.page_size = _Rows(rows.to(dtype)), page_size
        self.forward_metadata = copy.copy(kept[1])
        self.forward_metadata.page_table = table
        try:
            yield
        finally:
            self.token_to_kv_pool, self.forward_metadata, self.page_size = kept

    def _workspace(self, batch: int) -> torch.Tensor | None:
        """None lets the operation allocate: eager steps."""
        if self.decode_workspace is None or not torch.cuda.is_current_stream_capturing():
            return None
        return self.decode_workspace if self._workspace_bytes(batch) <= self.decode_workspace.numel() else None

    def _workspace_bytes(self, batch: int) -> int:
        return dense_mla.workspace_bytes(batch, self.num_q_heads, self.device)


class _Rows:
    """What SGLang's absorbed prefill reads of a pool."""

    def __init__(self, rows: torch.Tensor):
        self._rows = rows

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self._rows


def _own_pages(table: torch.Tensor, lengths: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(pages [N] int64 that requests of these lengths use, block table of the same requests over a copy of those).

    lengths: [B], on the host. The copy has the pages in the order of the requests.
    """
    counts = -(-lengths // page_size)
    used, width = _used(counts, table.device)
    pages = table[:, :width].reshape(-1)[used].long()
    return pages, _filled(torch.arange(len(used), dtype=table.dtype, device=table.device), used, len(counts), width)


def _table_of_rows(places: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[B, longest] int32 of the places [N] int32 of all tokens, request by request. lengths: [B], on the host."""
    used, width = _used(lengths, places.device)
    return _filled(places, used, len(lengths), width)


def _used(counts: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, int]:
    """(index, in a table [B, width] that is laid flat, of the first counts[b] entries of its rows, the least width).

    counts: on the host, or the device would be waited for.
    """
    width = int(counts.max())
    return (torch.arange(width) < counts[:, None]).flatten().nonzero()[:, 0].to(device), width


def _filled(values: torch.Tensor, used: torch.Tensor, requests: int, width: int) -> torch.Tensor:
    """[requests, width] with the values where `used` says so, else 0."""
    table = values.new_zeros(requests * width)
    table[used] = values
    return table.view(requests, width)


class NsaPluginMLADraftSteps(FlashAttentionMultiStepBackend):
    """One backend per step of the draft model."""

    def __init__(self, runner: Any, topk: int, steps: int):
        super().__init__(runner, topk, 1)  # one step: no backend of stock's
        self.speculative_num_steps = steps
        self.attn_backends.extend(
            NsaPluginMLABackend(runner, speculative_step_id=step, topk=topk, speculative_num_steps=steps)
            for step in range(steps - 1)
        )
