"""Every implementation of the indexer's preparation against the float32 reference, to fp8 rounding."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.layouts import INDEX_LAYOUTS, SCALE_FORMATS
from nsa_backend_plugin.ops import indexer_prep
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.index_key_cache import reference as index_key_reference
from tests.ops.common import poison
from tests.ops.implementations import run, runnable

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def flavour_of(case: int, device: torch.device) -> torch.dtype:
    """On a GPU its own fp8; the interpreter has both, in turn."""
    return (FN, FNUZ)[case % 2] if device.type == "cpu" else fp8_dtype(device)


def rotation(tokens: int, rope_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, cos_sin_cache)."""
    angle = 100 * torch.rand(300, rope_dim // 2, device=device)
    return torch.randint(0, 300, (tokens,), device=device), torch.cat([angle.cos(), angle.sin()], dim=1)


def magnitudes(*shape: int, device: torch.device) -> torch.Tensor:
    return 10 ** (8 * torch.rand(*shape, 1, device=device) - 4)


def assert_same_fp8(actual: torch.Tensor, expected: torch.Tensor, same_scale: torch.Tensor) -> None:
    """Equal but for neighbours at rounding boundaries in at most 0.1% of the values (3 in small tensors).

    Rows whose ue8m0 scale fell on the other side of a power of two are compared by value only.
    """
    a, b = (x.view(torch.uint8).int()[same_scale] for x in (actual, expected))
    ordered_a, ordered_b = (torch.where(x >= 128, 128 - x, x) for x in (a, b))
    difference = (ordered_a - ordered_b).abs()
    assert difference.numel() == 0 or difference.max() <= 1
    assert (difference > 0).sum() <= max(3, difference.numel() // 1000)


def assert_same_scale(actual: torch.Tensor, expected: torch.Tensor, scale_format: str) -> torch.Tensor:
    """Check scales to 1e-6 (ue8m0: equal, but for a rare power of two); returns where they agree."""
    same = (actual - expected).abs() <= 1e-6 * expected.abs()
    if scale_format == "fp32":
        assert same.all()
    else:
        assert (~same).sum() <= max(1, same.numel() // 1000)
    return same


@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("impl", runnable(indexer_prep.query))
def test_query(impl, scale_format, is_neox, device):
    cases = [
        (0, 4, 64, True, torch.bfloat16),
        (1, 64, 64, True, torch.bfloat16),
        (3, 12, 64, False, torch.float32),
        (65, 1, 64, True, torch.float16),
        (3, 3, 128, True, torch.bfloat16),
        (3, 3, 32, True, torch.bfloat16),
    ]
    for case, (tokens, heads, rope_dim, hadamard, dtype) in enumerate(cases):
        flavour = flavour_of(case, device)
        q = torch.randn(tokens, heads, 192, device=device) * magnitudes(tokens, heads, device=device)
        q = q.to(dtype)[..., :128]
        q[tokens // 2 : tokens // 2 + 1, 0] = 0
        gate = torch.randn(tokens, heads + 128, device=device).to(dtype)[:, 128:]
        arguments = (q, gate, *rotation(tokens, rope_dim, device))
        options = dict(weight_scale=0.37, is_neox=is_neox, hadamard=hadamard, scale_format=scale_format)
        actual, weights = run(indexer_prep.query, impl, *arguments, fp8_dtype=flavour, **options)
        expected, expected_weights = indexer_prep.query(*arguments, fp8_dtype=flavour, impl="torch", **options)
        same = assert_same_scale(weights, expected_weights, scale_format)
        assert_same_fp8(actual, expected, same)


@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("layout", INDEX_LAYOUTS)
@pytest.mark.parametrize("impl", runnable(indexer_prep.key_store))
def test_key_store(impl, layout, norm, is_neox, device):
    cases = [
        (0, 64, "fp32", True, torch.bfloat16),
        (1, 64, "fp32", True, torch.float32),
        (65, 64, "ue8m0", True, torch.bfloat16),
        (7, 16, "fp32", False, torch.float16),
    ]
    for case, (tokens, page_size, scale_format, hadamard, dtype) in enumerate(cases):
        flavour = flavour_of(case, device)
        key = torch.randn(tokens, 192, device=device) * magnitudes(tokens, device=device)
        key = key.to(dtype)[:, 64:]
        key[tokens // 2 : tokens // 2 + 1] = 0
        weight = torch.randn(128, device=device).to(dtype)
        bias = torch.randn(128, device=device) if norm == "layer" else None
        pages = -(-tokens // page_size) + 2
        slots = torch.randperm(pages * page_size, device=device)[:tokens]
        slots[::5] = -1
        arguments = (key, weight, bias, *rotation(tokens, 64, device))
        options = dict(norm=norm, is_neox=is_neox, hadamard=hadamard, layout=layout, page_size=page_size)
        options |= dict(scale_format=scale_format, fp8_dtype=flavour)
        actual = poison(pages, page_size * 132, dtype=torch.uint8, device=device)
        expected = actual.clone()
        run(indexer_prep.key_store, impl, *arguments, actual, slots, **options)
        indexer_prep.key_store(*arguments, expected, slots, impl="torch", **options)
        compare_caches(actual, expected, slots, layout, page_size, scale_format, flavour)


def compare_caches(actual, expected, slots, layout, page_size, scale_format, flavour) -> None:
    """Written tokens agree to rounding, all other bytes are untouched."""
    read = index_key_reference.read
    every = torch.arange(actual.shape[0] * page_size, device=actual.device)
    value, scale = read(actual, every, layout=layout, page_size=page_size, fp8_dtype=flavour)
    wanted, wanted_scale = read(expected, every, layout=layout, page_size=page_size, fp8_dtype=flavour)
    written = torch.isin(every, slots)
    assert torch.equal(value.view(torch.uint8)[~written], wanted.view(torch.uint8)[~written])
    assert torch.equal(scale.view(torch.int32)[~written], wanted_scale.view(torch.int32)[~written])
    same = assert_same_scale(scale[written], wanted_scale[written], scale_format)
    assert_same_fp8(value[written], wanted[written], same)


@pytest.mark.parametrize("is_neox", [False, True])
def test_rope_dim_that_neox_cannot_split_into_chunks_is_declined(is_neox, device):
    q, gate = torch.randn(2, 2, 128, device=device), torch.randn(2, 2, device=device)
    arguments = (q, gate, *rotation(2, 24, device))
    options = dict(weight_scale=1.0, is_neox=is_neox)
    if is_neox:
        with pytest.raises(ValueError, match="24 dimensions"):
            indexer_prep.query(*arguments, impl="triton", **options)
    else:
        actual, _ = indexer_prep.query(*arguments, impl="triton", **options)
        expected, _ = indexer_prep.query(*arguments, impl="torch", **options)
        assert_same_fp8(actual, expected, torch.ones(2, 2, dtype=torch.bool, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 300, 4096])
def test_served_shapes_are_bitwise_repeatable(tokens, is_neox, device):
    q = torch.randn(tokens, 64, 128, device=device).bfloat16()
    fused = torch.randn(tokens, 192, device=device).bfloat16()  # wk | weights_proj
    positions, cos_sin = rotation(tokens, 64, device)
    weight, bias = torch.rand(128, device=device), torch.randn(128, device=device)
    pages = -(-tokens // 64) + 2
    slots = torch.randperm(pages * 64, device=device)[:tokens]

    def once(impl: str):
        cache = poison(pages, 8448, dtype=torch.uint8, device=device)
        query = indexer_prep.query(
            q, fused[:, 128:], positions, cos_sin, weight_scale=0.1, is_neox=is_neox, scale_format="ue8m0", impl=impl
        )
        key = (fused[:, :128], weight, bias, positions, cos_sin, cache, slots)
        indexer_prep.key_store(*key, is_neox=is_neox, impl=impl)
        return *query, cache

    first, expected = once("triton"), once("torch")
    assert_same_fp8(first[0], expected[0], assert_same_scale(first[1], expected[1], "ue8m0"))
    compare_caches(first[2], expected[2], slots, "row_major", 64, "fp32", fp8_dtype(device))
    for _ in range(20):
        for a, b in zip(once("triton"), first, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("impl", runnable(indexer_prep.query))
def test_query_with_any_strides(impl, device):
    """Heads that lie apart, and positions that do."""
    q = torch.randn(5, 3, 2, 192, device=device)[:, :, 1, 32:160]
    positions, cos_sin = rotation(10, 64, device)
    gate = torch.randn(5, 9, device=device)[:, 3:6]
    options = dict(weight_scale=0.37, is_neox=True)
    actual, weights = run(indexer_prep.query, impl, q, gate, positions[::2], cos_sin, **options)
    dense = q.contiguous(), gate.contiguous(), positions[::2].contiguous(), cos_sin
    expected, expected_weights = indexer_prep.query(*dense, impl="torch", **options)
    assert_same_fp8(actual, expected, assert_same_scale(weights, expected_weights, "fp32"))
