"""Byte layouts: the vectorised formulas against one loop per byte, written from the layout's definition."""

from __future__ import annotations

import pytest
import torch

from nsa_backend_plugin import layouts

SIZES = [(64, 128), (16, 128), (128, 128), (32, 64)]


def row_major(t: int, d: int, dim: int) -> int:
    return t * dim + d


def preshuffled(t: int, d: int, dim: int) -> int:
    """Tiles of 16 tokens by 16 dims, tiles in token-major order, rows of a tile one after the other."""
    tile = (t // 16) * (dim // 16) + d // 16
    return tile * 256 + (t % 16) * 16 + d % 16


@pytest.mark.parametrize("page_size, dim", SIZES)
@pytest.mark.parametrize("layout, formula", [("row_major", row_major), ("preshuffled", preshuffled)])
def test_value_offsets_match_brute_force(layout, formula, page_size, dim):
    offsets = layouts.index_value_offsets(layout, page_size, dim)
    assert offsets.shape == (page_size, dim)
    expected = [[formula(t, d, dim) for d in range(dim)] for t in range(page_size)]
    assert offsets.tolist() == expected


@pytest.mark.parametrize("page_size, dim", SIZES)
@pytest.mark.parametrize("layout", layouts.INDEX_LAYOUTS)
def test_value_offsets_are_a_permutation_of_the_value_bytes(layout, page_size, dim):
    offsets = layouts.index_value_offsets(layout, page_size, dim).flatten()
    assert torch.equal(offsets.sort().values, torch.arange(page_size * dim))


def test_layouts_differ():
    offsets = [layouts.index_value_offsets(name) for name in layouts.INDEX_LAYOUTS]
    assert not torch.equal(*offsets)


@pytest.mark.parametrize("page_size, dim", SIZES)
def test_scales_follow_the_values_and_fill_the_page(page_size, dim):
    used = {layouts.index_scale_offset(t, page_size, dim) + byte for t in range(page_size) for byte in range(4)}
    assert used == set(range(page_size * dim, layouts.index_page_bytes(page_size, dim)))


def test_published_numbers():
    """What SGLang, DeepGEMM and AITER agree on: a page, the shuffled address of (17, 33), a latent row."""
    assert layouts.index_page_bytes() == 8448
    assert layouts.index_scale_offset(3, 64, 128) == 8192 + 12
    t, d = 17, 33
    expected = (t >> 4) * 2048 + (d >> 4) * 256 + (t & 15) * 16 + (d & 15)
    assert layouts.index_value_offsets("preshuffled")[t, d] == expected
    assert layouts.packed_latent_bytes(576) == 656


def test_unknown_layout():
    with pytest.raises(ValueError, match=r"layout='shuffled': expected one of row_major, preshuffled"):
        layouts.index_value_offsets("shuffled")


def test_fp8_limits():
    assert layouts.fp8_max(torch.float8_e4m3fn) == 448
    assert layouts.fp8_max(torch.float8_e4m3fnuz) == 240
