"""Byte layouts of the caches: one definition each, used by every writer and reader.

Index-K page (`page_size` tokens of `dim` fp8 values, then one fp32 scale per token):

    row_major    value byte: t*dim + d
    preshuffled  value byte: (t//16)*16*dim + (d//16)*256 + (t%16)*16 + d%16
    scale (both)           : page_size*dim + 4*t

Packed fp8 latent row: value_dim e4m3fn | value_dim/tile fp32 scales | RoPE part unquantized.
"""

from __future__ import annotations

import torch

INDEX_DIM = 128
INDEX_PAGE_SIZE = 64
INDEX_LAYOUTS = ("row_major", "preshuffled")
SCALE_FORMATS = ("fp32", "ue8m0")
#: Smallest amax that a scale is made from, so that an all-zero tile dequantizes to zeros and never to NaN.
MIN_AMAX = 1e-4

LATENT_DIM = 512
ROPE_DIM = 64
LATENT_TILE = 128
#: Of packed rows on every architecture: their bytes are FlashMLA's.
PACKED_FP8 = torch.float8_e4m3fn

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def fp8_max(dtype: torch.dtype) -> float:
    """Largest magnitude a cache may hold: 448 for e4m3fn, 240 for e4m3fnuz."""
    return torch.finfo(dtype).max


def index_page_bytes(page_size: int = INDEX_PAGE_SIZE, dim: int = INDEX_DIM) -> int:
    return page_size * (dim + 4)


def index_value_offset(token, dim, PRESHUFFLED, DIM):
    """Byte offset inside a page of value `dim` of DIM of the page's `token`-th token.

    Arithmetic only: it takes ints, torch tensors and, compiled with `triton.jit`, Triton tensors.
    """
    if PRESHUFFLED:
        return (token // 16) * (16 * DIM) + (dim // 16) * 256 + (token % 16) * 16 + dim % 16
    return token * DIM + dim


def index_scale_offset(token, PAGE_SIZE, DIM):
    """Byte offset inside a page of the fp32 scale of the page's `token`-th token; as `index_value_offset`."""
    return PAGE_SIZE * DIM + 4 * token


def index_value_offsets(layout: str, page_size: int = INDEX_PAGE_SIZE, dim: int = INDEX_DIM) -> torch.Tensor:
    """[page_size, dim] int64: `index_value_offset` of every value of a page."""
    if layout not in INDEX_LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(INDEX_LAYOUTS)}")
    return index_value_offset(
        torch.arange(page_size)[:, None], torch.arange(dim)[None, :], layout == "preshuffled", dim
    )


def packed_rope_offset(value_dim: int = LATENT_DIM, tile_size: int = LATENT_TILE) -> int:
    """Byte offset of the RoPE part inside a packed fp8 latent row: behind the values and their scales."""
    return value_dim + 4 * (value_dim // tile_size)


def packed_latent_bytes(dim: int, value_dim: int = LATENT_DIM, tile_size: int = LATENT_TILE, itemsize: int = 2) -> int:
    """Bytes of one packed fp8 latent row of `dim` values (656 for dim 576); itemsize: of a RoPE value."""
    return packed_rope_offset(value_dim, tile_size) + itemsize * (dim - value_dim)
