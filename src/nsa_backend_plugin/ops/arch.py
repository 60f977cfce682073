"""What a device is: its architecture name and fp8 flavour."""

from __future__ import annotations

import functools

import torch


@functools.cache
def _gpu_arch(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def device_arch(device: torch.device | str) -> str:
    """Architecture of a torch device: "cpu", "sm_90", "gfx942", ..."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    return _gpu_arch(torch.cuda.current_device() if device.index is None else device.index)


def fp8_dtype(device: torch.device | str) -> torch.dtype:
    """The fp8 flavour of a device: e4m3fnuz on gfx942 (bytes not interchangeable), e4m3fn elsewhere."""
    return torch.float8_e4m3fnuz if device_arch(device) == "gfx942" else torch.float8_e4m3fn


def is_cuda(arch: str) -> bool:
    return arch.startswith("sm_")


def is_rocm(arch: str) -> bool:
    return arch.startswith("gfx")


def launches_early(arch: str) -> bool:
    """Whether kernels can start while their predecessor runs (programmatic dependent launch): from sm_90 on."""
    return is_cuda(arch) and int(arch[3:]) >= 90
