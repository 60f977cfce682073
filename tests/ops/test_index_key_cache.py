"""Every implementation of the index-K cache against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.layouts import INDEX_LAYOUTS, SCALE_FORMATS, index_page_bytes
from nsa_backend_plugin.ops import index_key_cache
from nsa_backend_plugin.ops.arch import fp8_dtype, pretended
from nsa_backend_plugin.ops.index_key_cache import aiter, reference
from tests.ops import fake_aiter
from tests.ops.common import permuted_block_table, poison
from tests.ops.implementations import run, runnable

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def keys(tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of magnitudes 1e-4 to 1e4, the middle one all zero, strided as a slice of a fused projection."""
    wide = torch.randn(tokens, 192, device=device) * 10 ** (8 * torch.rand(tokens, 1, device=device) - 4)
    key = wide.to(dtype)[:, 32:160]
    key[tokens // 2 : tokens // 2 + 1] = 0
    return key


def slots_with_skips(tokens: int, capacity: int, device: torch.device) -> torch.Tensor:
    slots = torch.randperm(capacity, device=device)[:tokens]
    slots[::5] = -1
    return slots


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each 2 elements apart in its last dimension, with garbage between."""
    wide = torch.full((*tensor.shape, 2), 2**30, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def flavours(device: torch.device) -> list[torch.dtype]:
    return [FN, FNUZ] if device.type == "cpu" else [fp8_dtype(device)]


@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("impl", runnable(index_key_cache.store))
def test_store_writes_the_reference_bytes_and_no_others(impl, layout, scale_format, device):
    for tokens, page_size, dtype in [
        (0, 64, torch.bfloat16),
        (1, 64, torch.float32),
        (3, 16, torch.float16),
        (65, 64, torch.bfloat16),
    ]:
        for flavour in flavours(device):
            key = keys(tokens, device, dtype)
            slots = slots_with_skips(tokens, 5 * page_size, device)
            actual = poison(5, index_page_bytes(page_size), dtype=torch.uint8, device=device)
            expected = actual.clone()
            options = dict(layout=layout, scale_format=scale_format, page_size=page_size, fp8_dtype=flavour)
            run(index_key_cache.store, impl, key, actual, slots, **options)
            index_key_cache.store(key, expected, slots, impl="torch", **options)
            assert torch.equal(actual, expected), (tokens, page_size, flavour)


@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("page_size", [16, 48, 64])
@pytest.mark.parametrize("impl", runnable(index_key_cache.gather))
def test_gather_reads_pages_in_request_order(impl, page_size, layout, device):
    for lengths in ([0], [1], [64, 0, 65, 130], [63, 0, 0, 1, 200]):
        table, pages = permuted_block_table(lengths, page_size, device)
        table[table == 0] = -(2**30)  # entries past a request's pages may hold anything
        cache = torch.randint(0, 256, (pages, index_page_bytes(page_size)), dtype=torch.uint8, device=device)
        lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        options = dict(layout=layout, page_size=page_size)
        value, scale = run(index_key_cache.gather, impl, cache, table, lens, **options)
        expected_value, expected_scale = index_key_cache.gather(cache, table, lens, impl="torch", **options)
        assert value.dtype == expected_value.dtype
        assert torch.equal(value.view(torch.uint8), expected_value.view(torch.uint8))
        assert torch.equal(scale.view(torch.int32), expected_scale.view(torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("tokens", [64, 300, 8192])
def test_store_is_bitwise_repeatable(tokens, layout, device):
    key, slots = keys(tokens, device), slots_with_skips(tokens, 200 * 64, device)
    first = poison(200, 8448, dtype=torch.uint8, device=device)
    index_key_cache.store(key, first, slots, layout=layout, impl="torch")
    for _ in range(20):
        cache = poison(200, 8448, dtype=torch.uint8, device=device)
        index_key_cache.store(key, cache, slots, layout=layout, impl="triton")
        assert torch.equal(cache, first)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
def test_cache_past_two_to_the_31_bytes(layout, device):
    pages = 2**31 // 8448 + 1000
    cache = torch.zeros(pages, 8448, dtype=torch.uint8, device=device)
    key = keys(130, device)
    table = torch.tensor([[pages - 1, 3, pages - 500]], dtype=torch.int32, device=device)
    position = torch.arange(130, device=device)
    slots = table[0, position // 64].long() * 64 + position % 64
    index_key_cache.store(key, cache, slots, layout=layout, impl="triton")
    lens = torch.tensor([130], device=device)
    actual = index_key_cache.gather(cache, table, lens, layout=layout, impl="triton")
    expected = reference.quantize_rows(key, "fp32", actual[0].dtype)
    assert torch.equal(actual[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_aiter_is_called_as_it_wants(layout, scale_format, monkeypatch):
    fake_aiter.install(monkeypatch)
    cpu = torch.device("cpu")
    lengths = [70, 0, 3]
    table, pages = permuted_block_table(lengths, 64, cpu)
    key, slots = keys(65, cpu), slots_with_skips(65, pages * 64, cpu).int()
    actual = poison(pages, 8448, dtype=torch.uint8, device=cpu)
    expected = actual.clone()
    options = dict(layout=layout, page_size=64, fp8_dtype=FNUZ)
    aiter.store(index_key_cache.store.call(key, actual, slots, scale_format=scale_format, **options))
    index_key_cache.store(key, expected, slots, scale_format=scale_format, impl="torch", **options)
    assert torch.equal(actual, expected)

    call = index_key_cache.gather.call(actual, strided(table), strided(torch.tensor(lengths)), **options)
    value, scale = aiter.gather(call)
    expected_value, expected_scale = index_key_cache.gather(
        actual, table, torch.tensor(lengths), impl="torch", **options
    )
    assert torch.equal(value.view(torch.uint8), expected_value.view(torch.uint8))
    assert torch.equal(scale.view(torch.int32), expected_scale.view(torch.int32))


def test_what_aiter_would_misread_is_declined():
    cache, slots = torch.zeros(2, 8448, dtype=torch.uint8), torch.tensor([3])
    with pretended("gfx942") as meta:
        for flavour, key, why in (
            (FNUZ, torch.bfloat16, None),
            (FNUZ, torch.float32, "takes bf16 and fp16 keys, not fp32"),
            (FN, torch.bfloat16, "writes and reads torch.float8_e4m3fnuz, not torch.float8_e4m3fn"),
        ):
            keys = torch.zeros(1, 128, dtype=key, device=meta)
            call = index_key_cache.store.call(keys, cache.to(meta), slots.to(meta), fp8_dtype=flavour)
            assert aiter.declines_store(call) == why
    assert "ROCm" in aiter.available("sm_90")


@pytest.mark.parametrize("impl", runnable(index_key_cache.gather))
def test_gather_with_any_strides(impl, device):
    """A table whose entries lie apart, and lengths that do."""
    lengths = [70, 0, 3]
    table, pages = permuted_block_table(lengths, 64, device)
    cache = torch.randint(0, 256, (pages, 8448), dtype=torch.uint8, device=device)
    lens = torch.tensor(lengths, device=device)
    expected = index_key_cache.gather(cache, table, lens, impl="torch")
    actual = run(index_key_cache.gather, impl, cache, strided(table), strided(lens))
    assert torch.equal(actual[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(actual[1].view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.parametrize("impl", runnable(index_key_cache.store))
def test_store_with_strided_slots(impl, device):
    key, slots = keys(9, device), slots_with_skips(9, 128, device)
    actual, expected = (torch.zeros(2, 8448, dtype=torch.uint8, device=device) for _ in range(2))
    run(index_key_cache.store, impl, key, actual, strided(slots))
    index_key_cache.store(key, expected, slots, impl="torch")
    assert torch.equal(actual, expected)


def test_misaligned_cache_is_refused():
    flat = torch.zeros(3 * 8448 + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cache"):
        index_key_cache.store(torch.zeros(1, 128), flat[1:].view(3, 8448), torch.tensor([0]))
