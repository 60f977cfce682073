"""Every implementation of the index-K cache against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.layouts import INDEX_LAYOUTS, SCALE_FORMATS
from nsa_backend_plugin.ops import index_key_cache
from nsa_backend_plugin.ops.arch import fp8_dtype, pretended
from nsa_backend_plugin.ops.index_key_cache import aiter, reference
from tests.ops import fake_aiter
from tests.ops.implementations import run, runnable
from tools.calls import Calls, block_table, row_slots

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each 2 elements apart in its last dimension, with garbage between."""
    wide = torch.full((*tensor.shape, 2), 2**30, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def stored(impl: str, arguments: dict) -> torch.Tensor:
    """The cache after a call, which leaves that of the arguments as it is."""
    cache = arguments["cache"].clone()
    run(index_key_cache.store, impl, **{**arguments, "cache": cache})
    return cache


def assert_same(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Values and scales, byte for byte."""
    assert actual[0].dtype == expected[0].dtype
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


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
            arguments = Calls(device, dtype).index_key_cache_store(tokens, layout, page_size)
            arguments |= dict(scale_format=scale_format, fp8_dtype=flavour)
            actual, expected = stored(impl, arguments), stored("torch", arguments)
            assert torch.equal(actual, expected), (tokens, page_size, flavour)


@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("page_size", [16, 48, 64])
@pytest.mark.parametrize("impl", runnable(index_key_cache.gather))
def test_gather_reads_pages_in_request_order(impl, page_size, layout, device):
    for lengths in ([0], [1], [64, 0, 65, 130], [63, 0, 0, 1, 200]):
        arguments = Calls(device).index_key_cache_gather(lengths, layout, page_size)
        actual = run(index_key_cache.gather, impl, **arguments)
        assert_same(actual, index_key_cache.gather(**arguments, impl="torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("tokens", [64, 300, 8192])
def test_store_is_bitwise_repeatable(tokens, layout, device):
    arguments = Calls(device).index_key_cache_store(tokens, layout)
    first = stored("torch", arguments)
    for _ in range(20):
        assert torch.equal(stored("triton", arguments), first)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
def test_cache_past_two_to_the_31_bytes(layout, device):
    pages = 2**31 // 8448 + 1000
    cache = torch.zeros(pages, 8448, dtype=torch.uint8, device=device)
    key = Calls(device).tokens(130, 128)
    table = torch.tensor([[pages - 1, 3, pages - 500]], dtype=torch.int32, device=device)
    index_key_cache.store(key, cache, row_slots(table[0], 130, 64), layout=layout, impl="triton")
    lens = torch.tensor([130], device=device)
    actual = index_key_cache.gather(cache, table, lens, layout=layout, impl="triton")
    assert_same(actual, reference.quantize_rows(key, "fp32", actual[0].dtype))


@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_aiter_is_called_as_it_wants(layout, scale_format, monkeypatch):
    fake_aiter.install(monkeypatch)
    cpu = torch.device("cpu")
    store = Calls(cpu).index_key_cache_store(65, layout)
    store |= {"slots": store["slots"].int(), "scale_format": scale_format, "fp8_dtype": FNUZ}
    expected = stored("torch", store)
    aiter.store(index_key_cache.store.call(**store))
    assert torch.equal(store["cache"], expected)

    lengths = [70, 0, 3]
    table, pages = block_table(lengths, 64, cpu)
    cache = torch.randint(0, 256, (pages, 8448), dtype=torch.uint8)
    options = dict(layout=layout, fp8_dtype=FNUZ)
    call = index_key_cache.gather.call(cache, strided(table), strided(torch.tensor(lengths)), **options)
    expected = index_key_cache.gather(cache, table, torch.tensor(lengths), impl="torch", **options)
    assert_same(aiter.gather(call), expected)


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
    arguments = Calls(device).index_key_cache_gather([70, 0, 3])
    apart = {name: strided(arguments[name]) for name in ("block_table", "seq_lens")}
    actual = run(index_key_cache.gather, impl, **(arguments | apart))
    assert_same(actual, index_key_cache.gather(**arguments, impl="torch"))


@pytest.mark.parametrize("impl", runnable(index_key_cache.store))
def test_store_with_strided_slots(impl, device):
    arguments = Calls(device).index_key_cache_store(9)
    actual = stored(impl, {**arguments, "slots": strided(arguments["slots"])})
    assert torch.equal(actual, stored("torch", arguments))
