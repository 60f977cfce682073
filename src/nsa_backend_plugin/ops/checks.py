"""Argument checks: every failure is a ValueError that names the argument, the value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nsa_backend_plugin.layouts import FP8_DTYPES, packed_latent_bytes

INT_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KV_DTYPES = (*FLOAT_DTYPES, *FP8_DTYPES, torch.uint8)
_NUMBERS = (int, float)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def tensor(
    name: str,
    value: object,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Check type, rank, sizes (None = any), dtype and device of a tensor argument."""
    # In the hot path of every layer: comparisons only, words are made where one fails.
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}={value!r}: expected a torch.Tensor")
    dtype = value.dtype
    if dtype is not dtypes and (isinstance(dtypes, torch.dtype) or dtype not in dtypes):
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
        raise ValueError(f"{name} has dtype {dtype}: expected {' or '.join(map(str, allowed))}")
    actual = value.shape
    if actual != shape and not _fits(actual, shape):  # the first comparison settles a shape without wildcards
        want = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} has shape {list(actual)}: expected [{want}]")
    if device is not None:
        on_device(name, value, device)


def _fits(actual: Sequence[int], shape: Sequence[int | None]) -> bool:
    if len(actual) != len(shape):
        return False
    for place, want in enumerate(shape):  # noqa: SIM110 - a generator takes longer than all else here
        if want is not None and want != actual[place]:
            return False
    return True


def on_device(name: str, value: torch.Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on device {value.device}: expected {device}")


def inner_contiguous(name: str, value: torch.Tensor) -> None:
    """Kernels read the last dimension with wide loads: its stride must be 1."""
    if value.stride(-1) != 1 and value.numel():
        raise ValueError(f"{name} has strides {value.stride()}: expected stride 1 in the last dimension")


def contiguous(name: str, value: torch.Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {value.stride()}: expected a contiguous tensor")


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}")


def positive(name: str, value: object) -> None:
    if type(value) is not int or value < 1:  # a bool is no int here
        raise ValueError(f"{name}={value!r}: expected a positive int")


def positive_number(name: str, value: object) -> None:
    if not isinstance(value, _NUMBERS) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive number")


def finite(name: str, value: object) -> None:
    if not isinstance(value, _NUMBERS) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")


def kv_kind(kv: torch.Tensor, query_dim: int, value_dim: int, name: str = "kv") -> str:
    """Kind of a latent cache: "bf16" (any float type), "fp8" (plain, one scalar scale) or "packed" (656-byte rows)."""
    if kv.dtype in FLOAT_DTYPES and kv.shape[-1] == query_dim:
        return "bf16"
    if kv.dtype in FP8_DTYPES and kv.shape[-1] == query_dim:
        return "fp8"
    if kv.dtype in (torch.uint8, torch.float8_e4m3fn) and kv.shape[-1] == packed_latent_bytes(query_dim, value_dim):
        return "packed"
    raise ValueError(
        f"{name} has shape {list(kv.shape)} and dtype {kv.dtype}: expected [slots, 1, {query_dim}] bf16, fp16, fp32 or "
        f"fp8, or [slots, 1, {packed_latent_bytes(query_dim, value_dim)}] packed uint8 or e4m3fn"
    )


def scale_of_fp8(name: str, scale: float | None, plain_fp8: bool) -> None:
    """The scale of plain fp8 rows, which other rows carry or need none."""
    if (scale is not None) != plain_fp8:
        raise ValueError(f"{name}={scale!r}: expected a float with plain fp8 kv, else None")
    if scale is not None:
        finite(name, scale)


def scratch(workspace: torch.Tensor | None, device: torch.device) -> None:
    """The form of a caller's workspace; `workspace` checks its size, which only the implementation knows."""
    if workspace is not None:
        tensor("workspace", workspace, (None,), torch.uint8, device)
        contiguous("workspace", workspace)
        if workspace.data_ptr() % 16:
            raise ValueError(f"workspace.data_ptr()={workspace.data_ptr()}: expected 16-byte alignment")


def workspace(given: torch.Tensor | None, needed: int, device: torch.device) -> torch.Tensor:
    """The caller's workspace, if it has the bytes that are needed; a new one where the caller has none."""
    if given is None:
        return torch.empty(needed, dtype=torch.uint8, device=device)
    if given.numel() < needed:
        raise ValueError(f"workspace.numel()={given.numel()}: expected at least {needed} bytes")
    return given


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
    if not value.is_cpu or value.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in value.aminmax())
    if smallest < low or largest >= high:
        bad = smallest if smallest < low else largest
        raise ValueError(f"{name} contains {bad}: expected {low} <= value < {high}")
