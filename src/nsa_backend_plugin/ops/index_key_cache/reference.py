"""Torch reference of the index-K cache."""

from __future__ import annotations

import torch

from nsa_backend_plugin.ops._torch.index_pages import read, write
from nsa_backend_plugin.ops._torch.quant import quantize_rows
from nsa_backend_plugin.ops.call import Reason
from nsa_backend_plugin.ops.index_key_cache import Gather, Store


def available(arch: str) -> Reason:
    return None


def store(call: Store) -> None:
    value, scale = quantize_rows(call.key, call.scale_format, call.fp8_dtype)
    write(value, scale, call.cache, call.slots, layout=call.layout, page_size=call.page_size)


def gather(call: Gather) -> tuple[torch.Tensor, torch.Tensor]:
    page_size = call.page_size
    slots = [
        call.block_table[b, position // page_size].long() * page_size + position % page_size
        for b, length in enumerate(call.seq_lens.tolist())
        for position in [torch.arange(length, device=call.cache.device)]
    ]
    slot = torch.cat(slots) if slots else torch.empty(0, dtype=torch.long, device=call.cache.device)
    return read(call.cache, slot, layout=call.layout, page_size=page_size, fp8_dtype=call.fp8_dtype)
