"""The cases that SGLang's quantize_k_cache is tested with, on `latent_cache.quantize`, values included.

Source: the generated tests of the speed-up of `_quantize_k_cache_slow` (sglang, nsa/quant_k_cache.py): [blocks,
block_size, h_k, d] in bf16, fp16 and fp32, with and without a RoPE part.
"""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin.ops import latent_cache
from nsa_backend_plugin.ops.arch import fp8_dtype
from tests.ops import naive
from tests.ops.implementations import run, runnable

IMPLEMENTATIONS = ["torch", *runnable(latent_cache.quantize)]
FP8 = torch.float8_e4m3fn
MAY_DECLINE = "not a power of two"  # of a tile: the reference's alone


@pytest.fixture(autouse=True)
def packed_layout(device):
    if fp8_dtype(device) != FP8:
        pytest.skip("the packed layout is e4m3fn")


def quantized(impl: str, kv: torch.Tensor, value_dim: int, tile: int) -> torch.Tensor:
    options = dict(value_dim=value_dim, tile_size=tile)
    packed = run(latent_cache.quantize, impl, kv, may_decline=MAY_DECLINE, **options)
    width = value_dim + 4 * (value_dim // tile) + kv.element_size() * (kv.shape[-1] - value_dim)
    assert packed.shape == (*kv.shape[:-1], width)
    assert packed.dtype == torch.uint8
    restored = run(latent_cache.dequantize, impl, packed, dtype=kv.dtype, may_decline=MAY_DECLINE, **options)
    assert restored.shape == kv.shape
    assert torch.equal(restored[..., value_dim:], kv[..., value_dim:])
    return packed


def scales(packed: torch.Tensor, value_dim: int, tile: int) -> torch.Tensor:
    return packed[..., value_dim : value_dim + 4 * (value_dim // tile)].clone().view(torch.float32)


#: name -> (blocks, block_size, d, value_dim, tile, dtype)
CASES = {
    "fp32 with RoPE": (1, 1, 192, 128, 64, torch.float32),
    "fp32 without RoPE": (2, 3, 128, 128, 64, torch.float32),
    "one tile": (2, 2, 128, 128, 128, torch.bfloat16),
    "8 RoPE values": (2, 3, 520, 512, 128, torch.bfloat16),
    "no RoPE": (1, 1, 512, 512, 128, torch.bfloat16),
    "tile of 100": (1, 1, 100, 100, 100, torch.bfloat16),
    "value_dim 256": (4, 4, 256, 256, 64, torch.bfloat16),
    "fp16": (2, 2, 128, 128, 64, torch.float16),
    "fp32": (2, 2, 128, 128, 64, torch.float32),
    "wide RoPE": (2, 2, 256, 128, 64, torch.float32),
    "RoPE of 44": (4, 8, 300, 256, 64, torch.float32),
    "tile of 32": (4, 16, 64, 64, 32, torch.float32),
    "many tokens": (8, 16, 512, 512, 128, torch.bfloat16),
    "many blocks": (16, 16, 256, 256, 128, torch.bfloat16),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("blocks, block_size, dim, value_dim, tile, dtype", CASES.values(), ids=CASES.keys())
def test_every_byte_of_random_rows(impl, blocks, block_size, dim, value_dim, tile, dtype, device):
    kv = torch.randn(blocks, block_size, 1, dim, device=device).to(dtype)
    packed = quantized(impl, kv, value_dim, tile)
    if impl != "torch":
        assert torch.equal(packed, latent_cache.quantize(kv, value_dim=value_dim, tile_size=tile, impl="torch"))
    for b, t in ((0, 0), (blocks - 1, block_size - 1)):
        tiles = [naive.quantize(part.float().tolist(), FP8) for part in kv[b, t, 0, :value_dim].split(tile)]
        assert packed[b, t, 0, :value_dim].tolist() == [byte for values, _ in tiles for byte in values]
        expected = torch.tensor([scale for _, scale in tiles], device=device)
        assert torch.equal(scales(packed, value_dim, tile)[b, t, 0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "blocks, block_size, dim, value_dim, tile, dtype",
    [
        (512, 32, 300, 256, 64, torch.float32),
        (64, 64, 64, 64, 32, torch.float32),
        (128, 8, 256, 256, 64, torch.float32),
    ],
)
def test_large(impl, blocks, block_size, dim, value_dim, tile, dtype, device):
    kv = torch.randn(blocks, block_size, 1, dim, device=device).to(dtype)
    packed = quantized(impl, kv, value_dim, tile)
    assert torch.equal(packed, latent_cache.quantize(kv, value_dim=value_dim, tile_size=tile, impl="torch"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("value, blocks", [(1.0, 2), (-1.0, 1)])
def test_equal_values_have_equal_bytes(impl, value, blocks, device):
    kv = torch.full((blocks, 3, 1, 128), value, device=device)
    packed = quantized(impl, kv, 128, 64)
    assert packed[..., :128].unique().numel() == 1
    assert torch.equal(packed[..., :128].clone().view(FP8).float(), torch.full_like(kv, 448 * value))
    assert torch.equal(scales(packed, 128, 64), torch.full((blocks, 3, 1, 2), 1 / 448, device=device))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dim, dtype", [(128, torch.float32), (512, torch.bfloat16)])
def test_zeros(impl, dim, dtype, device):
    """Not a scale of 0, which SGLang's has: see the docstring of `quantize`."""
    kv = torch.zeros(1, 1, 1, dim, dtype=dtype, device=device)
    packed = quantized(impl, kv, dim, 128)
    torch.testing.assert_close(scales(packed, dim, 128), torch.full((1, 1, 1, dim // 128), 1e-4 / 448, device=device))
    restored = latent_cache.dequantize(packed, value_dim=dim, dtype=dtype, impl=impl)
    assert torch.equal(restored, kv)
