"""What a device is: its architecture name and fp8 flavour."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

_pretended: str | None = None
_KNOWN: dict[torch.device | str, str] = {torch.device("cpu"): "cpu"}


@functools.cache
def _gpu_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@contextlib.contextmanager
def pretended(arch: str) -> Iterator[torch.device]:
    """Within it, tensors on the `meta` device it yields count as tensors of an architecture: for `explain`."""
    global _pretended
    before, _pretended = _pretended, arch
    try:
        yield torch.device("meta")
    finally:
        _pretended = before


def device_arch(device: torch.device | str) -> str:
    """Architecture of a torch device: "cpu", "sm_90", "gfx942", ..."""
    known = _KNOWN.get(device)  # asked by every call of an operation
    if known is not None:
        return known
    if isinstance(device, str):
        return device_arch(torch.device(device))
    if device.type == "meta":
        return _pretended or device.type
    if device.type != "cuda":
        return device.type
    if device.index is None:
        return _gpu_arch(torch.cuda.current_device())
    return _KNOWN.setdefault(device, _gpu_arch(device.index))


def vendor(arch: str) -> str:
    """ "cuda", "rocm", or the architecture itself ("cpu")."""
    return "cuda" if is_cuda(arch) else "rocm" if is_rocm(arch) else arch


def arch_fp8_dtype(arch: str) -> torch.dtype:
    """The fp8 flavour of an architecture: e4m3fnuz on gfx942 (bytes not interchangeable), e4m3fn elsewhere."""
    return torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn


def fp8_dtype(device: torch.device | str) -> torch.dtype:
    """The fp8 flavour of a device."""
    return arch_fp8_dtype(device_arch(device))


@functools.cache
def core_count(device: torch.device) -> int:
    """Multiprocessors (compute units) of a device, of `meta` those of the GPU that it stands for.

    1 without a GPU: of a CPU, where Triton's interpreter runs.
    """
    if device.type == "cpu" or not torch.cuda.is_available():
        return 1
    return torch.cuda.get_device_properties(None if device.type == "meta" else device).multi_processor_count


def is_cuda(arch: str) -> bool:
    return arch.startswith("sm_")


def is_rocm(arch: str) -> bool:
    return arch.startswith("gfx")


def launches_early(arch: str) -> bool:
    """Whether kernels can start while their predecessor runs (programmatic dependent launch): from sm_90 on."""
    return is_cuda(arch) and int(arch[3:]) >= 90
