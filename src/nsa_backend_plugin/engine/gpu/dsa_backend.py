"""GPU backend for DSA models: stock metadata, graph capture and MHA prefill; our sparse attention.

Everything that is bookkeeping (metadata, CUDA graphs, page tables, the choice of dense MHA for short prompts)
is SGLang's `DeepseekSparseAttnBackend`. Overridden is what computes: absorbed attention in decode and in extend, which
includes the verification of drafts and the draft model's extend.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend, DeepseekSparseAttnMultiStepBackend
from sglang.srt.model_executor.runner_utils import capture_mode
from sglang.srt.runtime_context import get_parallel

from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.engine import index_cache, query, unknown
from nsa_backend_plugin.engine.gpu import rocm, scratch, shards
from nsa_backend_plugin.engine.gpu.prefill_topk import PrefillMetadata
from nsa_backend_plugin.engine.indexer import Rows
from nsa_backend_plugin.engine.latent_rows import plain_fp8_scale
from nsa_backend_plugin.ops import mqa_logits, sparse_mla
from nsa_backend_plugin.ops.call import Step


class NsaPluginDSABackend(DeepseekSparseAttnBackend):
    """Sparse MLA attention through `ops.sparse_mla`, for bf16 and packed fp8 latent caches."""

    #: Read by the hook `prefill_key`.
    joins_prefill_keys = True

    def __init__(self, runner: Any, **speculative: Any):
        """speculative: what SGLang passes to the backends of a draft model (step, number of steps ...)."""
        super().__init__(runner, **speculative)
        if not self.use_fused_topk:
            raise ValueError(
                "nsa_plugin selects tokens as physical slots: SGLANG_DSA_FUSE_TOPK must be on, and prefill/decode "
                "disaggregation with index sharing is not supported"
            )
        if self.hisparse_coordinator is not None:
            raise ValueError("nsa_plugin does not support HiSparse: start without it")
        self.share = shards.Share.of(get_parallel())
        layout = index_cache.chosen_layout(self.device)
        if rocm.on_rocm():
            rocm.check_latent_cache(self.token_to_kv_pool)
        elif layout != "row_major":
            raise ValueError(
                f"NSA_PLUGIN_INDEX_LAYOUT={layout}: on CUDA SGLang's prefill writes the index-K pages row_major"
            )
        index_cache.declare_layout(self.token_to_kv_pool, layout)
        # Neither name is one of the stock kernels': no FlashMLA metadata is built per step, and every top-k
        # transform is the paged one, which yields physical slots.
        self.dsa_decode_impl = BACKEND_NAME
        self.dsa_prefill_impl = BACKEND_NAME
        self.enable_auto_select_prefill_impl = False
        #: Of the forward, or the captured graph, that is being prepared or runs.
        self.step = Step()
        #: Scratch of captured graphs, from before capture (see `init_cuda_graph_state`).
        self.attention_workspace: torch.Tensor | None = None
        self.logits_buffer: torch.Tensor | None = None

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.attention_workspace = scratch.reserve(
            "sparse attention", self._workspace_bytes(max_num_tokens), self.device
        )
        # As wide as the page table of a captured step, like the logits that stock allocates while capturing.
        page_size = self.token_to_kv_pool.page_size
        columns = -(-self.req_to_token.shape[1] // page_size) * page_size
        stride = columns + (mqa_logits.ROW_GUARD if rocm.on_rocm() else 0)
        size = max_num_tokens * stride * torch.float32.itemsize
        logits = scratch.reserve("index logits", size, self.device)[:size]
        self.logits_buffer = logits.view(torch.float32).view(max_num_tokens, stride)[:, :columns]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.step = Step()
        super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.step = Step()
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def draft_backend(self, factory: Any, per_step: bool) -> Any:
        """Backend of the draft model that SGLang's factory asks for, by the hook `draft_backends`."""
        runner, seed = factory.draft_model_runner, factory.seed_dsa_topk_from_draft_extend
        if per_step:
            return NsaPluginDSADraftSteps(runner, factory.topk, factory.speculative_num_steps, seed)
        return NsaPluginDSABackend(runner, seed_dsa_topk_from_draft_extend=seed)

    def queries_per_request(self, mode: Any) -> int | None:
        """Rows that each request of a batch has in the paged metadata; None for prefill, which is ragged."""
        if mode.is_decode():
            return 1
        if mode.is_target_verify() or mode.is_draft_extend_v2():
            return self.speculative_num_draft_tokens
        return None

    def decode_rows(self, per_request: int) -> Rows:
        """What the queries of a batch of decode, verification or draft-extend see, for the indexer."""
        metadata = self.forward_metadata
        table = metadata.real_page_table
        lengths = metadata.cache_seqlens_int32 if per_request == 1 else metadata.dsa_seqlens_expanded
        columns = table.shape[1] * self.token_to_kv_pool.page_size
        return Rows(table, None, lengths, columns, adjacent=per_request, step=self.step)

    def indexer_rows(self, forward_batch: Any) -> Rows:
        """As `decode_rows`, for a batch of any mode that ROCm serves."""
        if forward_batch.forward_mode.is_decode_or_idle():
            return self.decode_rows(1)
        return prefill_rows(self.forward_metadata)

    def get_indexer_metadata(self, layer_id: int, forward_batch: Any) -> Any:
        """What SGLang's own indexer reads of a batch; of a prefill with our top-k."""
        stock = super().get_indexer_metadata(layer_id, forward_batch)
        ours = forward_batch.forward_mode.is_extend_without_speculative() and not self.share.is_partial
        return PrefillMetadata(**vars(stock)) if ours else stock

    def captured_logits(self, tokens: int) -> torch.Tensor | None:
        """Scratch for a step's index logits while it is captured; None lets the operation allocate."""
        fits = self.logits_buffer is not None and tokens <= self.logits_buffer.shape[0]
        return self.logits_buffer if fits and torch.cuda.is_current_stream_capturing() else None

    def prepare_absorbed(self, *arguments: Any) -> tuple[Any, ...] | None:
        """Called by an SGLang with the patch `fused_decode`, in place of the hook of that name."""
        from nsa_backend_plugin.engine.gpu import absorb  # which imports this module

        return absorb.prepare_absorbed(self, *arguments)

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
        topk_indices: torch.Tensor | None = None,
        **keywords: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The answer [T, heads*512]; with decode context parallelism also its lse (`shards.answer`).

        k None: the fused path has written this token's latent row already.
        """
        unknown.refuse("the attention backend", keywords)
        if k is not None and save_kv_cache:
            self.token_to_kv_pool.set_mla_kv_buffer(layer, forward_batch.out_cache_loc, k, k_rope)
        return self._attend(q, q_rope, layer, topk_indices, forward_batch)

    def forward_extend(self, *arguments: Any, **keywords: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As `forward_decode`; SGLang's own where it prefills with dense attention."""
        forward = super().forward_extend if self.use_mha else self.forward_decode
        return forward(*arguments, **keywords)

    def _attend(
        self, q: torch.Tensor, q_rope: torch.Tensor | None, layer: Any, topk_indices: torch.Tensor | None, batch: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        q_all = query.absorbed(q, q_rope, layer)
        if topk_indices is None:
            raise ValueError(f"layer {layer.layer_id}: sparse attention was called without top-k indices")
        kv = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        lengths = self._selected(q_all.shape[0], batch)
        metadata = self.forward_metadata
        # SGLang pads its own lengths, with 0, for data and context parallelism, but not what they were clipped from.
        unpadded = metadata.dsa_cache_seqlens_int32.shape == metadata.dsa_seqlens_expanded.shape
        rows_have_keys = unpadded and lengths is metadata.dsa_cache_seqlens_int32
        slots = self._pad_topk_indices(topk_indices, q_all.shape[0])
        if capture_mode.is_capture_mode and self.queries_per_request(batch.forward_mode) is None:
            slots, lengths = _one_key_each(slots, lengths)
        if self.share.is_partial:
            slots, lengths = self.share.selected(slots)
            rows_have_keys = False
        out = sparse_mla.attend(
            q_all,
            kv,
            slots,
            layer.scaling,
            kv_scale=plain_fp8_scale(kv),
            value_dim=layer.v_head_dim,
            lengths=lengths,
            context=self._context(batch.forward_mode),
            rows_have_keys=rows_have_keys,
            return_lse=self.share.is_partial,
            step=self.step,
            workspace=self._workspace(q_all.shape[0]),
        )
        if self.share.is_partial:
            return shards.answer(*out)
        assert isinstance(out, torch.Tensor)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _selected(self, tokens: int, batch: Any) -> torch.Tensor | None:
        """[T] int32, the slots that lead each row of the top-k result: of a token at least one, of a row that pads the
        batch (for a prefill graph, tensor, data or context parallelism) none.

        None where a graph's padding lies between the tokens: draft-extend, whose requests of one token have more rows.
        And where draft steps take what an earlier step or draft-extend selected, of a shorter context (IndexShare).
        """
        lengths = self.forward_metadata.dsa_cache_seqlens_int32
        padding = tokens - lengths.shape[0]
        if batch.forward_mode.is_draft_extend_v2() or batch.reuse_dsa_topk_indices or padding < 0:
            return None
        if padding == 0:
            return lengths
        pad = functools.partial(torch.nn.functional.pad, lengths, (0, padding))
        return self.step.once(("lengths of a padded batch", tokens), pad, lengths)

    def _context(self, mode: Any) -> torch.Tensor | None:
        """[S] int32 rows of a prefill's requests, whole pages; None in other modes, whose queries are few."""
        metadata = self.forward_metadata
        if self.queries_per_request(mode) is not None or metadata.indexer_seq_lens_cpu is None:
            return None
        size, table = self.token_to_kv_pool.page_size, metadata.real_page_table

        def slots() -> torch.Tensor:
            counts = (-(-metadata.indexer_seq_lens_cpu // size)).tolist()
            pages = torch.cat([row[:count] for row, count in zip(table, counts, strict=True)])
            within = torch.arange(size, dtype=torch.int32, device=table.device)
            found = (pages[:, None] * size + within).flatten()
            return self.share.rows(found) if self.share.is_partial else found

        return self.step.once("slots of the context", slots, table)

    def _workspace(self, tokens: int) -> torch.Tensor | None:
        """None lets the operation allocate: eager steps, and prefill graphs, which are wider than decode's."""
        if self.attention_workspace is None or not torch.cuda.is_current_stream_capturing():
            return None
        return self.attention_workspace if self._workspace_bytes(tokens) <= self.attention_workspace.numel() else None

    def _workspace_bytes(self, tokens: int) -> int:
        return sparse_mla.workspace_bytes(
            tokens, self.num_q_heads * self.share.size, self.dsa_index_topk, self.device, value_dim=self.kv_lora_rank
        )


def _one_key_each(slots: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a prefill that is run to capture a graph attends to: its slots, and how many lead each row.

    Nobody reads its result, and its tokens are all in one page: every multiprocessor would ask for the same few rows,
    which took seconds for each captured size.
    """
    first = torch.full_like(slots, -1)
    first[:, :1] = slots[:, :1]
    return first, None if lengths is None else lengths.clamp_max(1)


def prefill_rows(metadata: Any) -> Rows:
    """What the queries of a prefill see, of SGLang's `DSAMetadata`."""
    lengths = metadata.indexer_seq_lens_cpu
    return Rows(
        metadata.real_page_table,
        metadata.token_to_batch_idx.int(),
        metadata.dsa_seqlens_expanded,
        columns=0,  # the gathered keys'
        seq_lens=metadata.cache_seqlens_int32,
        total_tokens=None if lengths is None else int(lengths.sum()),  # or each layer waits for the device
    )


class NsaPluginDSADraftSteps(DeepseekSparseAttnMultiStepBackend):
    """One backend per step of the draft model."""

    def __init__(self, runner: Any, topk: int, steps: int, seed_dsa_topk_from_draft_extend: bool):
        super().__init__(runner, topk, 1, seed_dsa_topk_from_draft_extend)  # one step: no backend of stock's
        self.speculative_num_steps = steps
        self.attn_backends.extend(
            NsaPluginDSABackend(
                runner,
                speculative_step_id=step,
                topk=topk,
                speculative_num_steps=steps,
                seed_dsa_topk_from_draft_extend=seed_dsa_topk_from_draft_extend,
            )
            for step in range(steps - 1)
        )
