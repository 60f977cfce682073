"""Comparisons shared by the operation tests."""

from __future__ import annotations

import torch


def cosine_distances(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Per row of the last dimension: 1 - 2*sum(x*y) / sum(x*x + y*y) in float64 (DeepGEMM's calc_diff); 0 of zeros."""
    x, y = actual.double(), expected.double()
    denominator = (x * x + y * y).sum(-1)
    distance = 1 - 2 * (x * y).sum(-1) / denominator
    return torch.where(denominator == 0, 0.0, distance)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bar: float, row_dims: int = 1) -> None:
    """Same inf/NaN masks, and in every row a cosine distance below the bar on the finite part.

    A row is the last `row_dims` dimensions. A bar on rows implies the same bar on the whole tensor, whose distance is a
    mean of its rows'; a whole tensor would hide one lost row among many.
    """
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    for mask in (torch.isfinite, torch.isposinf, torch.isneginf):
        wrong = (mask(actual) != mask(expected)).nonzero()
        assert not len(wrong), f"{mask.__name__} differs at {wrong[0].tolist()} and {len(wrong) - 1} more places"
    finite = torch.isfinite(expected)
    x, y = actual.where(finite, 0).double(), expected.where(finite, 0).double()
    distances = cosine_distances(*(t.flatten(-row_dims) if t.dim() else t[None] for t in (x, y)))
    if distances.numel() == 0:
        return
    rows = distances.flatten()
    row = int(rows.nan_to_num(float("inf")).argmax())
    if not rows[row] < bar:
        shape = x.shape
        error = (x - y).abs().reshape(rows.numel(), -1)[row]
        flat = row * error.numel() + int(error.argmax())
        position = [int(i) for i in torch.unravel_index(torch.tensor(flat), shape)]
        raise AssertionError(
            f"cosine distance {float(rows[row]):.3e} in the worst of {rows.numel()} rows, expected < {bar:.1e}; "
            f"{int((~(rows < bar)).sum())} rows miss it; its worst value, at {position}, "
            f"is {float(x[tuple(position)]):.6g}, expected {float(y[tuple(position)]):.6g}"
        )


def assert_neighbours(actual: torch.Tensor, expected: torch.Tensor, mantissa_bits: int, smallest: float) -> None:
    """Equal but for values on a rounding's edge: one step of the format at most, in 1% of the values or 3.

    smallest: the step of the format's smallest numbers. A mean over a row would depend on which value it is that moves.
    """
    x, y = actual.double(), expected.double()
    apart, step = (x - y).abs(), torch.maximum(x.abs(), y.abs()) * 2.0**-mantissa_bits + smallest
    worst = int((apart / step).argmax())
    assert (apart <= step).all(), f"value {worst}: {x.flatten()[worst]:.6g}, expected {y.flatten()[worst]:.6g}"
    moved = int((apart > 0.3 * step).sum())
    assert moved <= max(3, x.numel() // 100), f"{moved} of {x.numel()} values are a step apart"
