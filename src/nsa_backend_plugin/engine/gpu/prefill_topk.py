"""The top-k that SGLang's own indexer asks for in a prefill on NVIDIA."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata

from nsa_backend_plugin.layouts import INDEX_PAGE_SIZE
from nsa_backend_plugin.ops import topk


class PrefillMetadata(DSAIndexerMetadata):
    """SGLang's, with our top-k: exact where many logits are equal, and through the table of whole pages.

    SGLang's kernel for this form misses some of the best there. Where logits are cut into chunks, it also wants all
    slots of a token's request in a row for that token: a gigabyte for 8k tokens over 32k keys.
    """

    def topk_transform(
        self,
        logits: torch.Tensor,
        k: int,
        ks: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        ke_offset: torch.Tensor | None = None,
        batch_idx_list: torch.Tensor | None = None,
        topk_indices_offset_override: None = None,
    ) -> torch.Tensor:
        """Physical slots [T, k] int32, -1 padded, of logits [T, columns]. ks: [T], where each row begins; None: at 0.

        ke_offset: [T] keys of each token, batch_idx_list: [T] its request; None: of all tokens of the batch.
        cu_seqlens_q: what stock's kernel counts a chunk's rows by.
        """
        metadata = self.attn_metadata
        requests = metadata.token_to_batch_idx if batch_idx_list is None else batch_idx_list
        return topk.select(
            logits,
            metadata.dsa_seqlens_expanded if ke_offset is None else ke_offset,
            k,
            row_starts=ks,
            page_table=metadata.real_page_table,
            page_rows=requests.int(),
            page_size=INDEX_PAGE_SIZE,
        )
