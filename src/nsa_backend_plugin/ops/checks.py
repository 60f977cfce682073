"""Argument checks: every failure is a ValueError that names the argument, the value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

INT_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def tensor(
    name: str,
    value: object,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
) -> torch.Tensor:
    """Check type, rank, sizes (None = any), dtype and device of a tensor argument."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}={value!r}: expected a torch.Tensor")
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if value.dtype not in allowed:
        raise ValueError(f"{name} has dtype {value.dtype}: expected {' or '.join(map(str, allowed))}")
    actual = tuple(value.shape)
    if len(actual) != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, actual, strict=True)
    ):
        want = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {list(actual)}: expected [{want}]")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on device {value.device}: expected {device}")
    return value


def inner_contiguous(name: str, value: torch.Tensor) -> None:
    """Kernels read the last dimension with wide loads: its stride must be 1."""
    if value.numel() and value.stride(-1) != 1:
        raise ValueError(f"{name} has strides {value.stride()}: expected stride 1 in the last dimension")


def contiguous(name: str, value: torch.Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}: expected a contiguous tensor")


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}")


def positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive int")


def finite(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")


def used_pages(name: str, block_table: torch.Tensor, lengths: torch.Tensor, page_size: int, pages: int) -> None:
    """Check 0 <= page < pages of the entries that lengths [B] or [B, n] reach; those behind may be anything.

    Only on CPU.
    """
    if block_table.device.type == "cpu" and lengths.numel():
        longest = lengths.reshape(block_table.shape[0], -1).amax(1)
        used = torch.arange(block_table.shape[1]) * page_size < longest[:, None]
        index_range(name, block_table[used], 0, pages)


def index_range(name: str, value: torch.Tensor, low: int, high: int) -> None:
    """Check low <= value < high. Only on CPU: on a GPU the check would stall the stream on every call."""
    if value.device.type != "cpu" or value.numel() == 0:
        return
    smallest, largest = int(value.min()), int(value.max())
    if smallest < low or largest >= high:
        bad = smallest if smallest < low else largest
        raise ValueError(f"{name} contains {bad}: expected {low} <= value < {high}")
