"""Inputs and comparisons shared by the operation tests."""

from __future__ import annotations

import torch


def cosine_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """1 - 2*sum(x*y) / sum(x*x + y*y) in float64 (DeepGEMM's calc_diff); NaN in either never passes."""
    x, y = actual.double(), expected.double()
    denominator = (x * x + y * y).sum()
    return 0.0 if denominator == 0 else float(1 - 2 * (x * y).sum() / denominator)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bar: float) -> None:
    """Same inf/NaN masks, and a cosine distance below the bar on the finite part."""
    assert actual.shape == expected.shape
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(actual), finite), "inf/NaN masks differ"
    assert torch.equal(torch.isposinf(actual), torch.isposinf(expected))
    assert torch.equal(torch.isneginf(actual), torch.isneginf(expected))
    distance = cosine_distance(actual[finite], expected[finite])
    assert distance < bar, f"cosine distance {distance:.3e}, expected < {bar:.1e}"


def permuted_block_table(lengths: list[int], page_size: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """(block_table [B, max_pages] int32, pages): every sequence has its own pages, in random order, with spare
    pages between; entries past a sequence's pages point at a page that no sequence uses."""
    counts = [-(-n // page_size) for n in lengths]
    pages = sum(counts) + 3
    order = torch.randperm(pages - 1, device=device).int() + 1  # page 0 stays unused, and is what unused entries name
    table = torch.zeros(len(lengths), max(max(counts, default=0), 1), dtype=torch.int32, device=device)
    start = 0
    for b, count in enumerate(counts):
        table[b, :count] = order[start : start + count]
        start += count
    return table, pages


def slots_of(table: torch.Tensor, length: int, row: int, page_size: int) -> torch.Tensor:
    """[length] int64 physical slots of a sequence's tokens, in position order."""
    position = torch.arange(length, device=table.device)
    return table[row, position // page_size].long() * page_size + position % page_size


def poison(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor no correct result contains: NaN for floats, -7 for ints, 0x7F bytes (fp8 NaN) for uint8."""
    if dtype == torch.uint8:
        return torch.full(shape, 0x7F, dtype=dtype, device=device)
    value = float("nan") if dtype.is_floating_point else -7
    return torch.full(shape, value, dtype=dtype, device=device)
