"""Every implementation of the latent cache against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.ops import latent_cache
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.call import Declined
from nsa_backend_plugin.ops.latent_cache import aiter, reference
from tests.ops import fake_aiter
from tests.ops.common import assert_close, assert_neighbours, poison
from tests.ops.implementations import run, runnable

PACKED = torch.float8_e4m3fn


def latents(rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of magnitudes 1e-4 to 1e4 with an all-zero tile, a slice of a wider buffer."""
    wide = torch.randn(rows, width + 64, device=device) * 10 ** (8 * torch.rand(rows, 1, device=device) - 4)
    kv = wide.to(dtype)[:, :width]
    kv[rows // 2 : rows // 2 + 1, :128] = 0
    return kv


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
        kv = latents(rows, width, device, dtype)
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
    kv = latents(5, value_dim + 8, device, torch.float32)
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
    packed = latent_cache.quantize(latents(3, 576, device), impl="torch").flatten()
    shifted = torch.empty(start + packed.numel(), dtype=torch.uint8, device=device)[start:].copy_(packed).view(3, 656)
    expected = latent_cache.dequantize(packed.view(3, 656), impl="torch")
    assert torch.equal(run(latent_cache.dequantize, impl, shifted, may_decline="4-byte boundary"), expected)


def empty_cache(kind: str, slots: int, device: torch.device) -> torch.Tensor:
    """A cache whose every byte is 0x7F: NaN in all formats."""
    width = {"bf16": 2 * 576, "fp8": 576, "packed": 656}[kind]
    raw = poison(slots, 1, width, dtype=torch.uint8, device=device)
    return {"bf16": raw.view(torch.bfloat16), "fp8": raw.view(fp8_dtype(device)), "packed": raw}[kind]


class Call:
    """Inputs of one `store`, and the buffers that it writes."""

    def __init__(self, kind: str, tokens: int, heads: int, device: torch.device, dtype=torch.bfloat16, rotate=True):
        self.kind, self.device = kind, device
        self.kv = latents(tokens, 576, device, dtype)
        self.slots = torch.randperm(tokens + 20, device=device)[:tokens]
        self.slots[::5] = -1
        self.options: dict = {"kv_scale": 37.5 if kind == "fp8" else None}
        if rotate:
            angle = 100 * torch.rand(300, 32, device=device)
            self.options["cos_sin_cache"] = torch.cat([angle.cos(), angle.sin()], dim=1)
            self.options["positions"] = torch.randint(0, 300, (2 * tokens,), device=device)[::2]
        self.query = torch.randn(tokens, heads, 576, device=device).to(dtype)

    def run(self, impl: str, in_place: bool = False, **options) -> tuple[torch.Tensor, ...]:
        """(cache bytes, rotated key, rotated query) of one implementation."""
        k_nope, k_rope = self.kv[:, :512], self.kv[:, 512:].clone()
        query = self.query.clone()
        q_rope = query[..., 512:]
        q_all = query if in_place else torch.cat([query[..., :512], torch.full_like(q_rope, float("nan"))], dim=-1)
        cache = empty_cache(self.kind, self.kv.shape[0] + 20, self.device)
        k_out = k_rope if in_place else torch.full_like(k_rope, float("nan"))
        if q_rope.shape[1] and "positions" in self.options:
            options |= {"q_rope": q_rope, "q_all": q_all}
        arguments = (k_nope, k_rope, cache, self.slots)
        run(latent_cache.store, impl, *arguments, k_rope_out=k_out, **self.options, **options)
        return cache.view(torch.uint8), k_out.view(torch.int16), query.view(torch.int16), q_all.view(torch.int16)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_writes_the_reference_bytes_and_no_others(impl, in_place, is_neox, kind, device):
    if kind == "packed" and fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    for tokens, heads in [(1, 1), (3, 17), (65, 0), (13, 16)]:
        call = Call(kind, tokens, heads, device)
        actual, expected = (call.run(name, in_place, is_neox=is_neox) for name in (impl, "torch"))
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b), (tokens, heads)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_without_rotation(impl, dtype, kind, device):
    if kind == "packed" and fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    call = Call(kind, 5, 0, device, dtype, rotate=False)
    for a, b in zip(call.run(impl), call.run("torch"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_normalizes_the_key(impl, kind, device):
    """Sums in another order move a value across a rounding edge now and then: neighbours, not the same bytes."""
    if kind == "packed" and fp8_dtype(device) != PACKED:
        pytest.skip("the packed layout is e4m3fn")
    weight = torch.randn(512, device=device).to(torch.bfloat16)
    for tokens in (2, 13, 600):  # the first has no slot
        call = Call(kind, tokens, 2, device)
        options = {"norm_weight": weight, "norm_eps": 1e-3, "is_neox": True}
        (actual, *rotated), (expected, *want) = (call.run(name, **options) for name in (impl, "torch"))
        for a, b in zip(rotated, want, strict=True):
            assert torch.equal(a, b)
        kept = call.slots[call.slots >= 0]
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
    call = Call(kind, 9, 3, device)
    spread = torch.full((27,), 10**6, device=device)
    spread[::3] = call.slots
    call.slots = spread[::3]
    for a, b in zip(call.run(impl), call.run("torch"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", runnable(latent_cache.store))
def test_store_of_no_tokens(impl, device):
    call = Call("bf16", 0, 4, device)
    assert (call.run(impl)[0] == 0x7F).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
@pytest.mark.parametrize("tokens", [64, 300, 8192])
def test_store_is_bitwise_repeatable_in_place(tokens, kind, device):
    call = Call(kind, tokens, 24, device)
    cache, key, _, query = call.run("torch", is_neox=False)
    for _ in range(20):
        actual = call.run("triton", in_place=True, is_neox=False)
        assert torch.equal(actual[0], cache)
        assert torch.equal(actual[1], key)
        assert torch.equal(actual[3], query)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8", "packed"])
def test_cache_past_two_to_the_31_elements(kind, device):
    slots = 2**31 // 576 + 1000
    cache = empty_cache(kind, slots, device)
    call = Call(kind, 130, 0, device)
    call.slots = torch.randperm(900, device=device)[:130] + slots - 900
    small = empty_cache(kind, 900, device)
    k_nope, k_rope = call.kv[:, :512], call.kv[:, 512:]
    latent_cache.store(k_nope, k_rope, cache, call.slots, impl="triton", **call.options)
    latent_cache.store(k_nope, k_rope, small, call.slots - (slots - 900), impl="torch", **call.options)
    assert torch.equal(cache[-900:].view(torch.uint8), small.view(torch.uint8))
    assert (cache[:1000].view(torch.uint8) == 0x7F).all()


@pytest.mark.parametrize("kind, scale", [("bf16", None), ("fp8", 37.5), ("fp8", 1.0)])
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("heads", [0, 1, 12])
def test_aiter_is_called_as_it_wants(heads, is_neox, kind, scale, monkeypatch):
    """With a query, the fused call rotates it into q_all and leaves its first part; without, it writes the cache."""
    fake_aiter.install(monkeypatch)
    call = Call(kind, 7, heads, torch.device("cpu"))
    call.kv = torch.randn(7, 576).bfloat16()  # AITER does not saturate: stay below 448 after scaling
    k_nope, k_rope = call.kv[:, :512], call.kv[:, 512:]
    q_rope = call.query[..., 512:].clone() if heads else None
    options = {**call.options, "is_neox": is_neox, "kv_scale": scale, "q_rope": q_rope, "q_all": None}

    def arguments() -> latent_cache.Store:
        cache = empty_cache(kind, 27, call.device)
        q_all = torch.cat([call.query[..., :512], torch.full_like(q_rope, float("nan"))], dim=-1) if heads else None
        return latent_cache.store.call(k_nope, k_rope, cache, call.slots, **{**options, "q_all": q_all})

    expected, actual = arguments(), arguments()
    reference.store(expected)
    assert aiter.declines_store(actual) is None
    aiter.store(actual)
    assert torch.equal(actual.cache.view(torch.uint8), expected.cache.view(torch.uint8))
    assert actual.q_all is expected.q_all is None or torch.equal(actual.q_all, expected.q_all)


def test_aiter_declines_what_it_cannot_write():
    call = Call("bf16", 7, 0, torch.device("cpu"))

    def reason(kind: str = "bf16", **change) -> str | None:
        scale = 37.5 if kind == "fp8" else None
        options = {**call.options, "kv_scale": scale, **change}
        arguments = (call.kv[:, :512], call.kv[:, 512:], empty_cache(kind, 27, call.device), call.slots)
        return aiter.declines_store(latent_cache.store.call(*arguments, **options))

    assert reason() is None
    assert reason("fp8") is None
    assert "packed" in reason("packed")
    assert "rotated key" in reason(k_rope_out=torch.empty(7, 64).bfloat16())
    assert "always rotates" in reason(positions=None, cos_sin_cache=None)
    assert "normalize" in reason(norm_weight=torch.ones(512))
    assert "ROCm" in aiter.available("sm_90")
