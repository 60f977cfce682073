"""Every implementation of the concatenations against the reference, bit for bit."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from nsa_backend_plugin.ops import concat
from nsa_backend_plugin.ops.arch import fp8_dtype
from nsa_backend_plugin.ops.concat import sgl_kernel
from tests.ops.implementations import run, runnable
from tools.calls import Calls


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
@pytest.mark.parametrize("impl", runnable(concat.q_all))
def test_q_all(impl, tokens, device):
    for heads, dtype in [(1, torch.bfloat16), (12, torch.float16), (2, fp8_dtype(device))]:
        arguments = Calls(device, dtype).concat_q_all(tokens, heads)
        actual = run(concat.q_all, impl, **arguments)
        assert actual.is_contiguous()
        assert same_bits(actual, concat.q_all(**arguments, impl="torch"))


def test_q_all_of_one_buffer_is_a_view(device, monkeypatch):
    buffer = torch.randn(3, 4, 576, device=device)
    monkeypatch.setattr(concat.Operation, "run", None)  # nothing is dispatched
    joined = concat.q_all(buffer[..., :512], buffer[..., 512:])
    assert joined.data_ptr() == buffer.data_ptr()
    assert torch.equal(joined, buffer)
    with pytest.raises(ValueError, match="impl='magic'"):
        concat.q_all(buffer[..., :512], buffer[..., 512:], impl="magic")


def test_parts_that_only_look_joined_are_copied(device):
    """Another buffer, another order, a gap, a row of another part, another dtype in the same bytes."""
    buffer, other = torch.randn(2, 3, 4, 576, device=device)
    wide = torch.randn(3, 4, 640, device=device)
    for nope, rope in [
        (buffer[..., :512], other[..., 512:]),
        (buffer[..., 64:], buffer[..., :64]),
        (wide[..., :512], wide[..., 512:576]),
        (wide[..., :512], wide[..., 576:]),
        (buffer[:2, :, :512], buffer[1:, :, 512:]),
        (buffer[:1, :1, :512], other[:1, :1, 512:]),
    ]:
        assert concat.joined(nope, rope) is None
        joined = concat.q_all(nope, rope, impl="torch")
        assert torch.equal(joined, torch.cat([nope, rope], dim=-1))
        assert joined.data_ptr() != nope.data_ptr()
    halves = buffer.to(torch.bfloat16)
    assert concat.joined(halves[..., :512], halves.view(torch.float16)[..., 512:]) is None
    assert concat.joined(buffer.int()[..., :512], buffer.int()[..., 512:]) is None


@pytest.mark.parametrize("impl", runnable(concat.mla_k))
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
        arguments = Calls(device, source).concat_mla_k(tokens, heads)
        out = torch.full((tokens, heads, 192), float("nan"), device=device).to(target)
        result = run(concat.mla_k, impl, **arguments, out=out)
        assert result.data_ptr() == out.data_ptr()
        assert same_bits(out, concat.mla_k(**arguments, dtype=target, impl="torch")), (tokens, heads, source, target)


@pytest.mark.parametrize("impl", runnable(concat.mla_k))
def test_mla_k_with_widths_that_are_no_powers_of_two(impl, device):
    arguments = Calls(device).concat_mla_k(5, 3, 96, 48)
    assert same_bits(run(concat.mla_k, impl, **arguments), concat.mla_k(**arguments, impl="torch"))


@pytest.mark.parametrize("impl", runnable(concat.mla_k))
@pytest.mark.parametrize(
    "nope_pad, rope_pad, start", [(5, 0, 0), (4, 0, 0), (0, 3, 0), (0, 2, 0), (6, 2, 1), (8, 8, 8)]
)
def test_mla_k_of_rows_that_start_anywhere(impl, nope_pad, rope_pad, start, device):
    """The served shape, 128 heads, cut out of longer rows."""
    nope = torch.randn(3, 128, 128 + nope_pad + start, device=device).bfloat16()[..., start : start + 128]
    rope = torch.randn(3, 1, 64 + rope_pad + start, device=device).bfloat16()[..., start : start + 64]
    out = torch.full((3, 128, 192), float("nan"), device=device).bfloat16()
    assert same_bits(run(concat.mla_k, impl, nope, rope, out=out), concat.mla_k(nope, rope, impl="torch"))


def misreading_concat_mla_k(out, nope, rope):
    """SGLang's kernel: 4 values of k_nope and 2 of k_rope at a time, strides divided by as many."""
    assert all(t.data_ptr() % 16 == 0 for t in (out, nope, rope))
    tokens = nope.shape[0]
    token, head = torch.arange(tokens)[:, None, None], torch.arange(128)[None, :, None]
    chunk = head // 16 * 16 * nope.stride(1)  # a warp starts here, and goes on by whole loads of 4
    at = (token * nope.stride(0) + chunk) // 4 + head % 16 * (nope.stride(1) // 4)
    flat = nope.as_strided((nope.untyped_storage().nbytes() // 2 - nope.storage_offset(),), (1,))
    out[..., :128] = flat[(4 * at + torch.arange(128)).clamp_max(len(flat) - 1)]
    flat = rope.as_strided((rope.untyped_storage().nbytes() // 2 - rope.storage_offset(),), (1,))
    rows = flat[(2 * (torch.arange(tokens) * rope.stride(0) // 2)[:, None] + torch.arange(64)).clamp_max(len(flat) - 1)]
    out[..., 128:] = rows[:, None]


def test_sgl_kernel_takes_what_its_kernel_reads_right(monkeypatch):
    """Every call that the adapter takes is right with the kernel's own addressing, and it takes the usual ones."""
    monkeypatch.setitem(sys.modules, "sgl_kernel", types.SimpleNamespace(concat_mla_k=misreading_concat_mla_k))
    taken = set()
    for nope_pad in range(9):
        for rope_pad in range(5):
            for start in (0, 1, 8):
                nope = torch.randn(3, 128, 128 + nope_pad + start).bfloat16()[..., start : start + 128]
                rope = torch.randn(3, 1, 64 + rope_pad + start).bfloat16()[..., start : start + 64]
                call = concat.mla_k.call(nope, rope)
                if sgl_kernel.declines_mla_k(call) is None:
                    taken.add((nope_pad, rope_pad, start))
                    assert same_bits(sgl_kernel.mla_k(call), concat.mla_k(nope, rope, impl="torch"))
    assert taken == {(n, r, s) for n in (0, 4, 8) for r in (0, 2, 4) for s in (0, 8)}


def test_sgl_kernel_declines_other_shapes_dtypes_and_outputs():
    def reason(heads=128, nope=128, rope=64, dtype=torch.bfloat16, **options):
        parts = torch.zeros(2, heads, nope, dtype=dtype), torch.zeros(2, 1, rope, dtype=dtype)
        return sgl_kernel.declines_mla_k(concat.mla_k.call(*parts, **options))

    assert reason() is None
    assert "heads, nope, rope" in reason(heads=64)
    assert "heads, nope, rope" in reason(rope=32)
    assert "float16" in reason(dtype=torch.float16)
    assert "float8" in reason(dtype=torch.bfloat16, out=torch.zeros(2, 128, 192).to(torch.float8_e4m3fn))
    shifted = torch.zeros(2 * 128 * 192 + 1).bfloat16()[1:].view(2, 128, 192)
    assert "16-byte" in reason(out=shifted)
    assert "CUDA" in sgl_kernel.available("gfx950")


def test_fp8_saturates(device):
    fp8 = fp8_dtype(device)
    nope = torch.full((1, 1, 128), -1e4, device=device)
    rope = torch.full((1, 1, 64), 1e4, device=device)
    limit = torch.finfo(fp8).max
    for impl in ("torch", "triton"):
        result = concat.mla_k(nope, rope, dtype=fp8, impl=impl).float()
        assert torch.equal(result[0, 0].unique(), torch.tensor([-limit, limit], device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", runnable(concat.mla_k))
@pytest.mark.parametrize("target", ["bf16", "fp8"])
def test_output_past_two_to_the_31_elements(impl, target, device):
    dtype = torch.bfloat16 if target == "bf16" else fp8_dtype(device)
    tokens = 2**31 // (128 * 192) + 100
    nope, rope = Calls(device).concat_mla_k(tokens, 128).values()
    out = torch.empty(tokens, 128, 192, dtype=dtype, device=device)
    out.view(torch.uint8).fill_(0x7F)
    run(concat.mla_k, impl, nope, rope, out=out)
    for rows in (slice(0, 64), slice(tokens - 64, tokens)):
        assert same_bits(out[rows], concat.mla_k(nope[rows], rope[rows], dtype=dtype, impl="torch"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", runnable(concat.mla_k))
@pytest.mark.parametrize("tokens", [64, 300, 4096])
def test_served_shape_is_bitwise_repeatable(impl, tokens, device):
    nope, rope = Calls(device).concat_mla_k(tokens, 128).values()
    expected = concat.mla_k(nope, rope, impl="torch")
    for _ in range(20):
        assert same_bits(run(concat.mla_k, impl, nope, rope), expected)
