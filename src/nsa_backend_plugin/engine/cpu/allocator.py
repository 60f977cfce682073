"""Paged allocation without Triton, for releases whose paged allocator launches it unconditionally."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.utils.common import get_num_new_pages


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's allocator with the two kernel launches replaced."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if (pages := self._take(num_new_pages)) is None:
            return None
        slots = torch.empty(extend_num_tokens, dtype=torch.int64, device=self.device)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, pages, slots, self.page_size, self.device)
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        starts_page = (seq_lens - 1) % self.page_size == 0
        if (pages := self._take(int(starts_page.sum()))) is None:
            return None
        slots = last_loc.to(torch.int64) + 1
        slots[starts_page] = pages * self.page_size
        return slots

    def _take(self, count: int) -> torch.Tensor | None:
        """Free pages, or None. Prefill and decode servers keep what was freed apart until it is needed (need_sort)."""
        if self.need_sort and count > len(self.free_pages):
            self.merge_and_sort_free()
        if count > len(self.free_pages):
            return None
        pages, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return pages


def create(size: int, *, page_size: int, dtype: torch.dtype, device: str, kvcache: Any, need_sort: bool) -> Any:
    """What the older releases call the platform's allocator class, at page size 1 too."""
    if page_size == 1:
        return TokenToKVPoolAllocator(size, dtype, device, kvcache, need_sort)
    return TorchPagedAllocator(size, page_size, dtype, device, kvcache, need_sort)
