"""Torch reference of the index-K cache."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.index_pages import read, write
from nsa_backend_plugin.ops._torch.paging import row_slots
from nsa_backend_plugin.ops._torch.quant import quantize_rows
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.index_key_cache import Gather, Store


def available(arch: str) -> Reason:
    return None


def store(call: Store) -> None:
    value, scale = quantize_rows(call.key, call.scale_format, call.fp8_dtype)
    write(value, scale, call.cache, call.slots, layout=call.layout, page_size=call.page_size)


def gather(call: Gather) -> tuple[torch.Tensor, torch.Tensor]:
    page_size, lengths = call.page_size, call.seq_lens.tolist()
    slots = [torch.empty(0, dtype=torch.long, device=call.cache.device)]  # of no request
    slots += [row_slots(pages, length, page_size) for pages, length in zip(call.block_table, lengths, strict=True)]
    return read(call.cache, torch.cat(slots), layout=call.layout, page_size=page_size, fp8_dtype=call.fp8_dtype)
