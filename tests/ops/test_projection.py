"""Every implementation of the projections against float64, per token."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.ops import projection
from tests.conftest import HAS_GPU
from tests.ops.common import assert_close
from tests.ops.implementations import run, runnable
from tools.calls import Calls, poison

FP8 = torch.float8_e4m3fn
LINEAR = ["torch", *runnable(projection.linear)]
PER_HEAD = ["torch", *runnable(projection.per_head)]
TOO_MANY = "tokens: at most"
NORM_OF_BF16 = "a norm before bf16 weights"
#: Of a row against float64: bf16 results.
BAR = 5e-6
#: Against float64 of the quantized values: DeepGEMM's own. A value on a rounding's edge may fall to either side.
FP8_BAR = 1e-3


def dequantized(weight: torch.Tensor, weight_scale: torch.Tensor | None, **_: object) -> torch.Tensor:
    weight, scale = weight.double(), weight_scale
    if scale is None:
        return weight
    return weight * scale.double().repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)


def quantized_tokens(x: torch.Tensor) -> torch.Tensor:
    """Tokens as an fp8 product sees them, in float64."""
    groups = x.float().unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448
    return ((groups / scale).to(FP8).double() * scale.double()).flatten(1)


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    return wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 32, 33, 64, 70])
@pytest.mark.parametrize("impl", LINEAR)
def test_fp8_blocks(impl, tokens, device):
    for rows, depth in [(64, 128), (2112 // 8, 1024), (200, 384)]:
        arguments = Calls(device).projection_linear(tokens, rows, depth)
        out = poison(tokens, rows + 16, dtype=torch.bfloat16, device=device)[:, :rows]
        run(projection.linear, impl, **arguments, out=out, may_decline=TOO_MANY)
        assert_close(out, quantized_tokens(arguments["x"]) @ dequantized(**arguments).t(), FP8_BAR)


@pytest.mark.parametrize("impl", LINEAR)
def test_shapes_of_the_served_layer(impl, device):
    """The shapes of a layer of V3.2: warps and clusters share the depth in different ways. On a CPU, few rows."""
    for rows, depth, norm in [(2112, 7168, False), (11264, 1536, True), (7168, 2048, False), (512, 16384, False)]:
        rows = rows if HAS_GPU else 40
        arguments = Calls(device).projection_linear(5, rows, depth, norm=norm)
        out = run(projection.linear, impl, **arguments)
        seen = normalized(arguments["x"], arguments["norm_weight"], 1e-6) if norm else arguments["x"]
        assert_close(out, quantized_tokens(seen) @ dequantized(**arguments).t(), FP8_BAR)


@pytest.mark.parametrize("tokens", [1, 8, 13, 32, 49])
@pytest.mark.parametrize("impl", LINEAR)
def test_bf16(impl, tokens, device):
    for rows, depth, dtype in [(192, 1792, torch.float32), (48, 64, torch.bfloat16), (130, 320, torch.bfloat16)]:
        arguments = Calls(device).projection_linear(tokens, rows, depth, fp8=False)
        out = poison(tokens, rows + 16, dtype=dtype, device=device)[:, :rows]
        result = run(projection.linear, impl, **arguments, dtype=dtype, out=out, may_decline=TOO_MANY)
        assert result.data_ptr() == out.data_ptr()
        want = arguments["x"].double() @ arguments["weight"].double().t()
        assert_close(out, want, 1e-9 if dtype == torch.float32 else BAR)


@pytest.mark.parametrize("impl", LINEAR)
def test_norm(impl, device):
    for eps, fp8 in [(1e-6, True), (1e-2, True), (1e-2, False)]:
        arguments = Calls(device).projection_linear(7, 96, 640, fp8, norm=True)
        out = run(projection.linear, impl, **arguments, eps=eps, may_decline=NORM_OF_BF16)
        seen = normalized(arguments["x"], arguments["norm_weight"], eps)
        seen = quantized_tokens(seen) if fp8 else seen
        assert_close(out, seen @ dequantized(**arguments).t(), FP8_BAR if fp8 else BAR)


@pytest.mark.parametrize("impl", LINEAR)
def test_groups_of_a_token_far_apart(impl, device):
    """Each 128 values have a scale of their own; the smallest is that of 1e-4."""
    x, weight, scale, _ = Calls(device).projection_linear(3, 64, 512).values()
    x[:, :128] *= 2.0**40
    x[:, 128:256] *= 2.0**-60
    for part in (slice(0, 128), slice(256, 512)):
        alone = torch.zeros_like(x)
        alone[:, part] = x[:, part]
        out = run(projection.linear, impl, alone, weight, scale)
        assert_close(out, quantized_tokens(alone) @ dequantized(weight, scale).t(), FP8_BAR)
    alone = torch.zeros_like(x)
    alone[:, 128:256] = x[:, 128:256]
    assert not run(projection.linear, impl, alone, weight, scale).any()
    gain = torch.ones(512, dtype=torch.bfloat16, device=device)
    out = run(projection.linear, impl, alone, weight, scale, norm_weight=gain, eps=1e-30)
    assert_close(out, quantized_tokens(normalized(alone, gain, 1e-30)) @ dequantized(weight, scale).t(), FP8_BAR)


@pytest.mark.parametrize("impl", LINEAR)
def test_one_bad_token_harms_no_other(impl, device):
    x, weight, scale, _ = Calls(device).projection_linear(6, 64, 256).values()
    want = run(projection.linear, impl, x, weight, scale)
    x[2] = float("nan")
    x[4] = 0
    out = run(projection.linear, impl, x, weight, scale)
    assert out[2].isnan().all()
    assert not out[4].any()
    good = [0, 1, 3, 5]
    assert torch.equal(out[good], want[good])


@pytest.mark.parametrize("tokens", [0, 1, 8, 11, 32])
@pytest.mark.parametrize("impl", PER_HEAD)
def test_per_head(impl, tokens, device):
    """As W_UK: queries are part of wider rows, and results part of q_all."""
    for heads, depth, rows in [(3, 128, 512), (16, 512, 128), (5, 192, 40)]:
        x, weight = Calls(device).projection_per_head(tokens, heads, rows, depth).values()
        q_all = poison(tokens, heads, rows + 64, dtype=torch.bfloat16, device=device)
        run(projection.per_head, impl, x, weight, out=q_all[..., :rows], may_decline=TOO_MANY)
        assert_close(q_all[..., :rows], torch.einsum("thk,hnk->thn", x.double(), weight.double()), BAR)
        assert q_all[..., rows:].isnan().all()


def test_kinds_of_weights_that_are_refused(device):
    x, weight, scale, _ = Calls(device).projection_linear(2, 64, 256).values()
    with pytest.raises(ValueError, match="weight_scale=None: expected a tensor with fp8 weights"):
        projection.linear(x, weight)
    with pytest.raises(ValueError, match=r"weight_scale=.*: expected a tensor with fp8 weights, None with bf16"):
        projection.linear(x, weight.to(torch.bfloat16), scale)
    with pytest.raises(ValueError, match=r"x.shape\[1\]=192: expected a multiple of 128"):
        projection.linear(x[:, :192], weight[:, :192].contiguous(), scale[:, :1].contiguous())
