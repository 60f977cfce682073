"""Every implementation of the latent cache against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.ops import latent_cache
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.call import Declined
from nsa_backend_plugin.ops.latent_cache import aiter, reference
from tests.ops import fake_aiter
from tests.ops.common import assert_close, assert_neighbours
from tests.ops.implementations import run, runnable
from tools.calls import Calls, poison

PACKED = torch.float8_e4m3fn


@pytest.mark.parametrize("impl", runnable(latent_cache.quantize))
def test_quantize_and_dequantize(impl, device):
    if fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    for rows, width, value_dim, tile, dtype in [
        (0, 576, 512, 128, torch.bfloat16),
        (1, 576, 512, 128, torch.bfloat16),
        (65, 576, 512, 128, torch.bfloat16),
        (3, 248, 192, 64, torch.float16),  # three tiles, a RoPE part of 56
        (600, 576, 512, 128, torch.float32),
        (5, 512, 512, 128, torch.bfloat16),  # no RoPE part
        (5, 64, 64, 16, torch.float32),
    ]:
        kv = Calls(device, dtype).latent_cache_quantize(rows, width)["kv"]
        options = dict(value_dim=value_dim, tile_size=tile)
        packed = run(latent_cache.quantize, impl, kv, **options)
        assert torch.equal(packed, latent_cache.quantize(kv, impl="torch", **options))
        restored = run(latent_cache.dequantize, impl, packed, dtype=dtype, **options)
        expected = latent_cache.dequantize(packed, dtype=dtype, impl="torch", **options)
        assert torch.equal(restored, expected)
        assert torch.isfinite(restored).all()


@pytest.mark.parametrize("impl", runnable(latent_cache.quantize))
@pytest.mark.parametrize("value_dim, tile", [(100, 100), (120, 40), (66, 2)])
def test_tiles_that_no_kernel_takes(impl, value_dim, tile, device):
    """The reference takes any tile that divides; ours say why not."""
    if fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    kv = Calls(device, torch.float32).latent_cache_quantize(5, value_dim + 8)["kv"]
    options = dict(value_dim=value_dim, tile_size=tile)
    packed = latent_cache.quantize(kv, impl="torch", **options)
    restored = latent_cache.dequantize(packed, dtype=torch.float32, impl="torch", **options)
    assert_close(restored[:, :value_dim], kv[:, :value_dim], 1e-3)
    assert torch.equal(restored[:, value_dim:], kv[:, value_dim:])
    why = "boundaries" if value_dim % 4 else "not a power of two"
    with pytest.raises(Declined, match=why):
        latent_cache.quantize(kv, impl=impl, **options)
    with pytest.raises(Declined, match=why):
        latent_cache.dequantize(packed, impl=impl, dtype=torch.float32, **options)


@pytest.mark.parametrize("impl", ["torch", *runnable(latent_cache.dequantize)])
@pytest.mark.parametrize("start", [1, 2, 4])
def test_packed_rows_that_start_anywhere(impl, start, device):
    if fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    packed = Calls(device).latent_cache_dequantize(3)["packed"].flatten()
    shifted = torch.empty(start + packed.numel(), dtype=torch.uint8, device=device)[start:].copy_(packed).view(3, 656)
    expected = latent_cache.dequantize(packed.view(3, 656), impl="torch")
    assert torch.equal(run(latent_cache.dequantize, impl, shifted, may_decline="4-byte boundary"), expected)


def written(impl: str, arguments: dict, in_place: bool = False, **options) -> tuple[torch.Tensor, ...]:
    """(cache bytes, rotated key, query, rotated query) of one implementation; in_place: rotated where they are."""
    names = ("cache", "k_rope", "k_rope_out", "q_rope", "q_all")
    own = {**arguments, **{name: arguments[name].clone() for name in names if name in arguments}}
    if in_place:
        own["k_rope_out"] = own["k_rope"]
    if in_place and "q_all" in own:
        own["q_all"][..., 512:] = own["q_rope"]
        own["q_rope"] = own["q_all"][..., 512:]
    run(latent_cache.store, impl, **own, **options)
    none = own["k_rope"][:0]
    return own["cache"].view(torch.uint8), *(
        own.get(name, none).contiguous().view(torch.int16) for name in ("k_rope_out", "q_rope", "q_all")
    )


@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_writes_the_reference_bytes_and_no_others(impl, in_place, is_neox, kind, device):
    if kind == "packed" and fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    for tokens, heads in [(1, 1), (3, 17), (65, 0), (13, 16)]:
        arguments = Calls(device).latent_cache_store(tokens, kind, heads)
        actual, expected = (written(name, arguments, in_place, is_neox=is_neox) for name in (impl, "torch"))
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b), (tokens, heads)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_without_rotation(impl, dtype, kind, device):
    if kind == "packed" and fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    arguments = Calls(device, dtype).latent_cache_store(5, kind, rotated=False)
    for a, b in zip(written(impl, arguments), written("torch", arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_normalizes_the_key(impl, kind, device):
    """Sums in another order move a value across a rounding edge now and then: neighbours, not the same bytes."""
    if kind == "packed" and fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    weight = torch.randn(512, device=device).to(torch.bfloat16)
    for tokens in (2, 13, 600):  # the first has no slot
        arguments = Calls(device).latent_cache_store(tokens, kind, 2)
        options = {"norm_weight": weight, "norm_eps": 1e-3, "is_neox": True}
        (actual, *rotated), (expected, *want) = (written(name, arguments, **options) for name in (impl, "torch"))
        for a, b in zip(rotated, want, strict=True):
            assert torch.equal(a, b)
        kept = arguments["slots"][arguments["slots"] >= 0]
        assert (actual.index_fill(0, kept, 0x7F) == 0x7F).all()
        values = [as_values(cache[kept], kind)[:, :512] for cache in (actual, expected)]
        smallest = {"bf16": 0.0, "fp8": 2**-9, "packed": float(values[1].abs().amax()) * 2**-17}[kind]
        assert_neighbours(*values, 7 if kind == "bf16" else 3, smallest)


def as_values(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """[n, 576] float32 of cache bytes [n, 1, width]."""
    if kind == "packed":
        return latent_cache.dequantize(rows[:, 0].contiguous(), impl="torch").float()
    return rows[:, 0].view(torch.bfloat16 if kind == "bf16" else fp8_dtype(rows.device)).float()


@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_reads_vectors_of_any_stride(impl, kind, device):
    if kind == "packed" and fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    arguments = Calls(device).latent_cache_store(9, kind, 3)
    for name, filler in (("slots", 10**6), ("positions", 10**6)):
        spread = torch.full((27,), filler, device=device)
        spread[::3] = arguments[name]
        arguments[name] = spread[::3]
    for a, b in zip(written(impl, arguments), written("torch", arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_of_no_tokens(impl, device):
    assert (written(impl, Calls(device).latent_cache_store(0, "bf16", 4))[0] == 0x7F).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("tokens", [64, 300, 8192])
def test_store_is_bitwise_repeatable_in_place(tokens, kind, device):
    arguments = Calls(device).latent_cache_store(tokens, kind, 24)
    cache, key, _, query = written("torch", arguments)
    for _ in range(20):
        actual = written("triton", arguments, in_place=True)
        assert torch.equal(actual[0], cache)
        assert torch.equal(actual[1], key)
        assert torch.equal(actual[3], query)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
def test_cache_past_two_to_the_31_elements(kind, device):
    arguments = Calls(device).latent_cache_store(130, kind)
    small, slots = arguments["cache"], arguments["slots"]
    before = 2**31 // 576
    big = poison(before + len(small), *small.view(torch.uint8).shape[1:], dtype=torch.uint8, device=device)
    moved = {"cache": big.view(small.dtype), "slots": slots.where(slots < 0, slots + before)}
    latent_cache.store(**(arguments | moved), impl="triton")
    latent_cache.store(**arguments, impl="torch")
    assert torch.equal(big[before:], small.view(torch.uint8))
    assert (big[:1000] == 0x7F).all()


@pytest.mark.parametrize("kind, scale", [("bf16", None), ("fp8", 37.5), ("fp8", 1.0)])
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("heads", [0, 1, 12])
def test_aiter_is_called_as_it_wants(heads, is_neox, kind, scale, monkeypatch):
    """With a query, the fused call rotates it into q_all and leaves its first part; without, it writes the cache."""
    fake_aiter.install(monkeypatch)
    call = Calls(torch.device("cpu")).latent_cache_store(7, kind, heads)
    del call["k_rope_out"]
    kv = torch.randn(7, 576).bfloat16()  # AITER does not saturate: stay below 448 after scaling
    call |= {"k_nope": kv[:, :512], "k_rope": kv[:, 512:], "is_neox": is_neox, "kv_scale": scale}

    def arguments() -> latent_cache.Store:
        own = {name: call[name].clone() for name in ("cache", "q_rope", "q_all") if name in call}
        return latent_cache.store.call(**(call | own))

    expected, actual = arguments(), arguments()
    reference.store(expected)
    assert aiter.declines_store(actual) is None
    aiter.store(actual)
    assert torch.equal(actual.cache.view(torch.uint8), expected.cache.view(torch.uint8))
    assert actual.q_all is expected.q_all is None or torch.equal(actual.q_all, expected.q_all)


def test_aiter_declines_what_it_cannot_write():
    def reason(kind: str = "bf16", **change) -> str | None:
        call = {**Calls(torch.device("cpu")).latent_cache_store(7, kind), "k_rope_out": None, **change}
        return aiter.declines_store(latent_cache.store.call(**call))

    assert reason() is None
    assert reason("fp8") is None
    assert "packed" in reason("packed")
    assert "rotated key" in reason(k_rope_out=torch.empty(7, 64).bfloat16())
    assert "always rotates" in reason(positions=None, cos_sin_cache=None)
    assert "normalize" in reason(norm_weight=torch.ones(512))
    assert "ROCm" in aiter.available("sm_90")
