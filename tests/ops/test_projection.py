"""Every implementation of the projections against float64, per token."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.ops import projection
from tests.conftest import HAS_GPU
from tests.ops.common import assert_close, poison
from tests.ops.implementations import run, runnable

FP8 = torch.float8_e4m3fn
LINEAR = ["torch", *runnable(projection.linear)]
PER_HEAD = ["torch", *runnable(projection.per_head)]
TOO_MANY = "tokens: at most"
#: Of a row against float64: bf16 results.
BAR = 5e-6
#: Against float64 of the quantized values: DeepGEMM's own. A value on a rounding's edge may fall to either side.
FP8_BAR = 1e-3


def tokens_of(count: int, depth: int, device: torch.device) -> torch.Tensor:
    """[count, depth] bf16, part of wider rows, of magnitudes 1e-2 to 1e2."""
    x = torch.randn(count, depth + 64, device=device) * 10 ** (4 * torch.rand(count, 1, device=device) - 2)
    return x.to(torch.bfloat16)[:, :depth]


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values, scales of blocks of 128 x 128) of magnitudes that differ from block to block."""
    rows, depth = weight.shape
    scale = 0.5 + torch.rand(-(-rows // 128), depth // 128, device=weight.device)
    return weight.to(FP8), scale


def dequantized(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    weight = weight.double()
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


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 32, 70])
@pytest.mark.parametrize("impl", LINEAR)
def test_fp8_blocks(impl, tokens, device):
    for rows, depth in [(64, 128), (2112 // 8, 1024), (200, 384)]:
        x = tokens_of(tokens, depth, device)
        weight, scale = quantized(torch.randn(rows, depth, device=device))
        out = poison(tokens, rows + 16, dtype=torch.bfloat16, device=device)[:, :rows]
        run(projection.linear, impl, x, weight, scale, out=out, may_decline=TOO_MANY)
        assert_close(out, quantized_tokens(x) @ dequantized(weight, scale).t(), FP8_BAR)


@pytest.mark.parametrize("impl", LINEAR)
def test_shapes_of_the_served_layer(impl, device):
    """The shapes of a layer of V3.2: warps and clusters share the depth in different ways. On a CPU, few rows."""
    for rows, depth, norm in [(2112, 7168, False), (11264, 1536, True), (7168, 2048, False), (512, 16384, False)]:
        rows = rows if HAS_GPU else 40
        x = tokens_of(5, depth, device)
        weight, scale = quantized(torch.randn(rows, depth, device=device))
        gain = (torch.rand(depth, device=device) + 0.5).to(torch.bfloat16) if norm else None
        out = run(projection.linear, impl, x, weight, scale, norm_weight=gain)
        seen = x if gain is None else normalized(x, gain, 1e-6)
        assert_close(out, quantized_tokens(seen) @ dequantized(weight, scale).t(), FP8_BAR)


@pytest.mark.parametrize("tokens", [1, 8, 13, 32])
@pytest.mark.parametrize("impl", LINEAR)
def test_bf16(impl, tokens, device):
    for rows, depth, dtype in [(192, 1792, torch.float32), (48, 64, torch.bfloat16), (130, 320, torch.bfloat16)]:
        x = tokens_of(tokens, depth, device)
        weight = torch.randn(rows, depth, device=device).to(torch.bfloat16)
        out = poison(tokens, rows + 16, dtype=dtype, device=device)[:, :rows]
        result = run(projection.linear, impl, x, weight, dtype=dtype, out=out, may_decline=TOO_MANY)
        assert result.data_ptr() == out.data_ptr()
        assert_close(out, x.double() @ weight.double().t(), 1e-9 if dtype == torch.float32 else BAR)


@pytest.mark.parametrize("impl", LINEAR)
def test_norm(impl, device):
    for eps, fp8 in [(1e-6, True), (1e-2, True), (1e-2, False)]:
        x = tokens_of(7, 640, device)
        gain = (torch.rand(640, device=device) + 0.5).to(torch.bfloat16)
        weight, scale = torch.randn(96, 640, device=device).to(torch.bfloat16), None
        if fp8:
            weight, scale = quantized(weight.float())
        out = run(projection.linear, impl, x, weight, scale, norm_weight=gain, eps=eps)
        seen = quantized_tokens(normalized(x, gain, eps)) if fp8 else normalized(x, gain, eps)
        assert_close(out, seen @ dequantized(weight, scale).t(), FP8_BAR if fp8 else BAR)


@pytest.mark.parametrize("impl", LINEAR)
def test_groups_of_a_token_far_apart(impl, device):
    """Each 128 values have a scale of their own; the smallest is that of 1e-4."""
    x = tokens_of(3, 512, device)
    x[:, :128] *= 2.0**40
    x[:, 128:256] *= 2.0**-60
    weight, scale = quantized(torch.randn(64, 512, device=device))
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
    x = tokens_of(6, 256, device)
    weight, scale = quantized(torch.randn(64, 256, device=device))
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
        x = tokens_of(tokens * heads, depth + 64, device).unflatten(0, (tokens, heads))[..., :depth]
        weight = torch.randn(heads, rows, depth, device=device).to(torch.bfloat16)
        q_all = poison(tokens, heads, rows + 64, dtype=torch.bfloat16, device=device)
        run(projection.per_head, impl, x, weight, out=q_all[..., :rows], may_decline=TOO_MANY)
        assert_close(q_all[..., :rows], torch.einsum("thk,hnk->thn", x.double(), weight.double()), BAR)
        assert q_all[..., rows:].isnan().all()


def test_kinds_of_weights_that_are_refused(device):
    x = tokens_of(2, 256, device)
    weight, scale = quantized(torch.randn(64, 256, device=device))
    with pytest.raises(ValueError, match="weight_scale=None: expected a tensor with fp8 weights"):
        projection.linear(x, weight)
    with pytest.raises(ValueError, match=r"weight_scale=.*: expected a tensor with fp8 weights, None with bf16"):
        projection.linear(x, weight.to(torch.bfloat16), scale)
    with pytest.raises(ValueError, match=r"x.shape\[1\]=192: expected a multiple of 128"):
        projection.linear(x[:, :192], weight[:, :192].contiguous(), scale[:, :1].contiguous())
