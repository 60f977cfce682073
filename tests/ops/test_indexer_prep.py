"""Every implementation of the indexer's preparation against the float32 reference, to fp8 rounding."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.layouts import INDEX_LAYOUTS, SCALE_FORMATS
from nsa_backend_plugin.ops import indexer_prep
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.index_key_cache import reference as index_key_reference
from tests.ops.implementations import run, runnable
from tools.calls import Calls

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def flavour_of(case: int, device: torch.device) -> torch.dtype:
    """On a GPU its own fp8; the interpreter has both, in turn."""
    return (FN, FNUZ)[case % 2] if device.type == "cpu" else fp8_dtype(device)


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
        arguments = Calls(device, dtype).indexer_prep_query(tokens, heads, rope_dim)
        arguments |= dict(is_neox=is_neox, hadamard=hadamard, scale_format=scale_format, fp8_dtype=flavour)
        actual, weights = run(indexer_prep.query, impl, **arguments)
        expected, expected_weights = indexer_prep.query(**arguments, impl="torch")
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
        arguments = Calls(device, dtype).indexer_prep_key_store(tokens, layout, page_size, norm)
        arguments |= dict(is_neox=is_neox, hadamard=hadamard, scale_format=scale_format, fp8_dtype=flavour)
        actual, expected, slots = arguments["cache"], arguments["cache"].clone(), arguments["slots"]
        run(indexer_prep.key_store, impl, **arguments)
        indexer_prep.key_store(**{**arguments, "cache": expected}, impl="torch")
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
    arguments = {**Calls(device, torch.float32).indexer_prep_query(2, 2, 24), "is_neox": is_neox}
    if is_neox:
        with pytest.raises(ValueError, match="24 dimensions"):
            indexer_prep.query(**arguments, impl="triton")
    else:
        actual, _ = indexer_prep.query(**arguments, impl="triton")
        expected, _ = indexer_prep.query(**arguments, impl="torch")
        assert_same_fp8(actual, expected, torch.ones(2, 2, dtype=torch.bool, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 300, 4096])
def test_served_shapes_are_bitwise_repeatable(tokens, is_neox, device):
    query = {**Calls(device).indexer_prep_query(tokens, 64), "is_neox": is_neox, "scale_format": "ue8m0"}
    key = {**Calls(device).indexer_prep_key_store(tokens), "is_neox": is_neox}

    def once(impl: str):
        cache = key["cache"].clone()
        indexer_prep.key_store(**{**key, "cache": cache}, impl=impl)
        return *indexer_prep.query(**query, impl=impl), cache

    first, expected = once("triton"), once("torch")
    assert_same_fp8(first[0], expected[0], assert_same_scale(first[1], expected[1], "ue8m0"))
    compare_caches(first[2], expected[2], key["slots"], "row_major", 64, "fp32", fp8_dtype(device))
    for _ in range(20):
        for a, b in zip(once("triton"), first, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("impl", runnable(indexer_prep.query))
def test_query_with_any_strides(impl, device):
    """Heads that lie apart, and positions that do."""
    q = torch.randn(5, 3, 2, 192, device=device)[:, :, 1, 32:160]
    positions, cos_sin = Calls(device).rotation(10).values()
    gate = torch.randn(5, 9, device=device)[:, 3:6]
    options = dict(weight_scale=0.37, is_neox=True)
    actual, weights = run(indexer_prep.query, impl, q, gate, positions[::2], cos_sin, **options)
    dense = q.contiguous(), gate.contiguous(), positions[::2].contiguous(), cos_sin
    expected, expected_weights = indexer_prep.query(*dense, impl="torch", **options)
    assert_same_fp8(actual, expected, assert_same_scale(weights, expected_weights, "fp32"))
