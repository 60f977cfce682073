"""Slots and caches of the CPU platform where a server of a disaggregated pair uses them differently."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nsa_backend_plugin.engine.cpu.allocator import TorchPagedAllocator
from nsa_backend_plugin.engine.cpu.pools import CpuDSATokenToKVPool

pytestmark = pytest.mark.engine

PAGE = 64


def test_pages_that_were_freed_and_kept_apart_are_found_again():
    """need_sort: what a prefill or decode server frees is not free at once."""
    pages = 4
    kvcache = SimpleNamespace(page_size=PAGE)
    allocator = TorchPagedAllocator(pages * PAGE, PAGE, torch.bfloat16, "cpu", kvcache, need_sort=True)
    nothing, length = torch.tensor([0]), torch.tensor([2 * PAGE])
    before = torch.tensor([-1])
    for _ in range(5):
        slots = allocator.alloc_extend(nothing, nothing, length, length, before, 2 * PAGE)
        assert slots is not None
        next_one = allocator.alloc_decode(length + 1, length + 1, slots[-1:])
        assert next_one is not None
        assert len({int(slot) // PAGE for slot in (*slots, *next_one)}) == 3
        allocator.free(torch.cat([slots, next_one]))
    assert allocator.alloc_extend(nothing, nothing, length * 4, length * 4, before, 8 * PAGE) is None


def test_what_a_decode_server_retracts_comes_back_in_other_slots():
    pool = object.__new__(CpuDSATokenToKVPool)
    layers, pages = 2, 6
    pool.page_size = PAGE
    pool.kv_buffer = [torch.randn(pages * PAGE, 1, 576) for _ in range(layers)]
    index_keys = [torch.randint(256, (pages, PAGE * 132), dtype=torch.uint8), torch.empty(0, PAGE * 132)]
    if isinstance(getattr(CpuDSATokenToKVPool, "index_k_with_scale_buffer", None), property):
        pool.index_key_cache = SimpleNamespace(buffer=index_keys)
    else:
        pool.index_k_with_scale_buffer = index_keys
    old = torch.cat([torch.arange(PAGE) + 4 * PAGE, torch.arange(10) + 1 * PAGE])
    new = torch.cat([torch.arange(PAGE) + 2 * PAGE, torch.arange(10) + 3 * PAGE])
    latent, keys = [layer[old].clone() for layer in pool.kv_buffer], index_keys[0][[4, 1]].clone()
    copy = pool.get_cpu_copy(old)
    for layer in pool.kv_buffer:
        layer[old] = 0
    index_keys[0][[4, 1]] = 0
    pool.load_cpu_copy(copy, new)
    assert all(torch.equal(layer[new], rows) for layer, rows in zip(pool.kv_buffer, latent, strict=True))
    assert torch.equal(index_keys[0][[2, 3]], keys)
