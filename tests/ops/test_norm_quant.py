"""Every implementation of the quantizing RMS norm against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.layouts import fp8_max
from nsa_backend_plugin.ops import norm_quant
from tests.ops.implementations import run, runnable
from tools.calls import Calls

IMPLS = ["torch", *runnable(norm_quant.rms)]


def assert_rounded(values: torch.Tensor, scales: torch.Tensor, want: torch.Tensor) -> None:
    """Every value times its scale is the norm, rounded to bf16 and then to fp8: half a unit of the last of 3 mantissa
    bits, or of the smallest number. A bound of each value, because a mean over few of them is luck."""
    step = scales.double().repeat_interleave(128, -1)
    error = (values.double() * step - want).abs()
    limit = want.abs() * (2**-4 + 2**-7) + step * torch.finfo(values.dtype).smallest_normal / 2**4 * 1.01
    worst = int((error / limit).argmax())
    assert (error <= limit).all(), f"error {error.flatten()[worst]:.3g} of {want.flatten()[worst]:.6g}, value {worst}"


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
@pytest.mark.parametrize("impl", IMPLS)
def test_values_times_scales_are_the_norm(impl, tokens, device):
    for width, dtype in [(1536, torch.bfloat16), (128, torch.float16), (2048, torch.bfloat16), (640, torch.float32)]:
        x, weight = Calls(device, dtype).norm_quant_rms(tokens, width).values()
        values, scales = run(norm_quant.rms, impl, x, weight, eps=1e-5)
        assert values.shape == x.shape
        assert scales.shape == (tokens, width // 128)
        if tokens == 0:
            continue
        want = normalized(x, weight, 1e-5)
        limit = fp8_max(values.dtype)
        amax = want.abs().unflatten(-1, (-1, 128)).amax(-1)
        torch.testing.assert_close(scales.double(), amax / limit, rtol=0.01, atol=0)  # rounded to bf16 before
        assert_rounded(values, scales, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_that_are_powers_of_two(impl, device):
    x, weight = Calls(device).norm_quant_rms(64, 1536).values()
    values, scales = run(norm_quant.rms, impl, x, weight, scale_format="ue8m0")
    _, exact = norm_quant.rms(x, weight, impl="torch")
    assert torch.equal(scales.frexp().mantissa, torch.full_like(scales, 0.5))
    assert (scales >= exact * (1 - 2**-7)).all()
    assert (scales < 2 * exact * (1 + 2**-7)).all()
    assert_rounded(values, scales, normalized(x, weight, 1e-6))


@pytest.mark.parametrize("impl", IMPLS)
def test_columns_of_scales_are_aligned(impl, device):
    for tokens in (1, 4, 7):
        _, scales = run(norm_quant.rms, impl, **Calls(device).norm_quant_rms(tokens, 512))
        assert scales.stride() == (1, -(-tokens // 4) * 4)
        assert scales.data_ptr() % 16 == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_have_the_smallest_scale(impl, device):
    x, weight = Calls(device).norm_quant_rms(3, 256).values()
    x[1] = 0
    values, scales = run(norm_quant.rms, impl, x, weight)
    assert not values[1].float().any()
    torch.testing.assert_close(scales[1], torch.full_like(scales[1], 1e-4 / fp8_max(values.dtype)))
    assert values[[0, 2]].float().abs().amax(-1).min() == fp8_max(values.dtype)


@pytest.mark.parametrize("impl", runnable(norm_quant.rms))
def test_bytes_are_the_references(impl, device):
    """But for sums in another order, which may turn a rounding."""
    x, weight = Calls(device).norm_quant_rms(40, 1536).values()
    values, scales = run(norm_quant.rms, impl, x, weight)
    want, want_scales = norm_quant.rms(x, weight, impl="torch")
    assert (values.view(torch.uint8) == want.view(torch.uint8)).float().mean() > 0.98
    torch.testing.assert_close(scales, want_scales, rtol=2**-7, atol=0)
