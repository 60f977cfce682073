"""Every implementation of the concatenations against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.ops import concat
from nsa_backend_plugin.ops.arch import fp8_dtype
from tests.ops.implementations import others, run


def parts(tokens: int, heads: int, nope: int, rope: int, rope_heads: int, device: torch.device, dtype=torch.bfloat16):
    """Slices of wider buffers, magnitudes 1e-4 to 1e4."""

    def part(heads: int, width: int) -> torch.Tensor:
        scale = 10 ** (8 * torch.rand(tokens, heads, 1, device=device) - 4)
        return (torch.randn(tokens, heads, width + 64, device=device) * scale).to(dtype)[..., :width]

    return part(heads, nope), part(rope_heads, rope)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
@pytest.mark.parametrize("impl", others("concat.q_all"))
def test_q_all(impl, tokens, device):
    for heads, dtype in [(1, torch.bfloat16), (12, torch.float16), (2, fp8_dtype(device))]:
        nope, rope = parts(tokens, heads, 512, 64, heads, device, dtype)
        actual = run(concat.q_all, impl, nope, rope)
        assert actual.is_contiguous()
        assert same_bits(actual, concat.q_all(nope, rope, impl="torch"))


def test_q_all_of_one_buffer_is_a_view(device):
    buffer = torch.randn(3, 4, 576, device=device)
    joined = concat.q_all(buffer[..., :512], buffer[..., 512:])
    assert joined.data_ptr() == buffer.data_ptr()
    assert torch.equal(joined, buffer)


@pytest.mark.parametrize("impl", others("concat.mla_k"))
def test_mla_k(impl, device):
    fp8 = fp8_dtype(device)
    for tokens, heads, source, target in [
        (0, 8, torch.bfloat16, torch.bfloat16),
        (1, 1, torch.bfloat16, fp8),
        (3, 12, torch.float32, torch.bfloat16),
        (65, 3, torch.bfloat16, torch.bfloat16),
        (13, 16, torch.bfloat16, fp8),
        (3, 2, fp8, fp8),
    ]:
        nope, rope = parts(tokens, heads, 128, 64, 1, device, source)
        out = torch.full((tokens, heads, 192), float("nan"), device=device).to(target)
        result = run(concat.mla_k, impl, nope, rope, out=out)
        assert result.data_ptr() == out.data_ptr()
        assert same_bits(out, concat.mla_k(nope, rope, dtype=target, impl="torch")), (tokens, heads, source, target)


@pytest.mark.parametrize("impl", others("concat.mla_k"))
def test_mla_k_with_widths_that_are_no_powers_of_two(impl, device):
    nope, rope = parts(5, 3, 96, 48, 1, device)
    assert same_bits(run(concat.mla_k, impl, nope, rope), concat.mla_k(nope, rope, impl="torch"))


def test_fp8_saturates(device):
    fp8 = fp8_dtype(device)
    nope = torch.full((1, 1, 128), -1e4, device=device)
    rope = torch.full((1, 1, 64), 1e4, device=device)
    limit = torch.finfo(fp8).max
    for impl in ("torch", "triton"):
        result = concat.mla_k(nope, rope, dtype=fp8, impl=impl).float()
        assert torch.equal(result[0, 0].unique(), torch.tensor([-limit, limit], device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", others("concat.mla_k"))
@pytest.mark.parametrize("target", ["bf16", "fp8"])
def test_output_past_two_to_the_31_elements(impl, target, device):
    dtype = torch.bfloat16 if target == "bf16" else fp8_dtype(device)
    tokens = 2**31 // (128 * 192) + 100
    nope, rope = parts(tokens, 128, 128, 64, 1, device)
    out = torch.empty(tokens, 128, 192, dtype=dtype, device=device)
    out.view(torch.uint8).fill_(0x7F)
    run(concat.mla_k, impl, nope, rope, out=out)
    for rows in (slice(0, 64), slice(tokens - 64, tokens)):
        assert same_bits(out[rows], concat.mla_k(nope[rows], rope[rows], dtype=dtype, impl="torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", others("concat.mla_k"))
@pytest.mark.parametrize("tokens", [64, 300, 4096])
def test_served_shape_is_bitwise_repeatable(impl, tokens, device):
    nope, rope = parts(tokens, 128, 128, 64, 1, device)
    expected = concat.mla_k(nope, rope, impl="torch")
    for _ in range(20):
        assert same_bits(run(concat.mla_k, impl, nope, rope), expected)
