"""Run-time compilation of the CUDA C++ kernels that ship in this package, and their launch.

Compiler: NVRTC, through cuda.bindings, the low-level half of cuda-python, which SGLang depends on. It needs no nvcc, no
host compiler and no build folder. cuda.core wraps the same calls, but its module path and launch API changed between
releases and its launch offers no programmatic dependent launch; tvm-ffi builds through nvcc and a host compiler.

A source is one `.cu` file, free of toolkit headers (NVRTC ships none), whose kernels are `extern "C" __global__`.
Variants are made with defines, one cubin each. It may include `.cuh` files of its own folder and of this one.

    kernel = jit.load(Path(__file__).with_name("decode.cu"), "decode", "sm_90", {"HEADS": 16})
    jit.launch(kernel, grid=(tokens, 1, 1), block=(128, 1, 1), args=(q, out, tokens, scale), shared_bytes=98304)

Compiled cubins are kept in memory and in $XDG_CACHE_HOME/nsa_backend_plugin/cubin (default ~/.cache), keyed by source,
options and NVRTC version. `load` compiles and loads: call it before CUDA graph capture (the first eager call of an op
does). `launch` neither allocates nor synchronizes, and can be captured.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nsa_backend_plugin.ops.call import Reason

logger = logging.getLogger(__name__)

#: Dynamic shared memory that any kernel may use; beyond it the kernel's attribute must be raised first.
_DEFAULT_SHARED_BYTES = 48 * 1024
_Defines = tuple[tuple[str, object], ...]
_SHARED = Path(__file__).parent  # headers of several operations


class CompileError(RuntimeError):
    """NVRTC refused a source; the message holds its log."""


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel. `handle` is a CUkernel, valid on every device of its architecture."""

    name: str
    handle: Any


@functools.cache
def available(arch: str) -> Reason:
    """Why CUDA C++ cannot be compiled here for an architecture such as "sm_90"."""
    if not arch.startswith("sm_"):
        return f"CUDA C++ needs an NVIDIA GPU, not {arch}"
    try:
        if importlib.util.find_spec("cuda.bindings.nvrtc") is None:
            return "cuda-bindings (cuda-python) is not installed"
    except ModuleNotFoundError:
        return "cuda-bindings (cuda-python) is not installed"
    try:
        from cuda.bindings import nvrtc

        supported = _check(nvrtc.nvrtcGetSupportedArchs(), nvrtc)
    except Exception as error:  # cuda.bindings raises RuntimeError or its pathfinder's own types for a missing library
        return f"NVRTC cannot be loaded: {error}"
    if int(arch[3:]) not in supported:
        return f"NVRTC {_nvrtc_version()} has no target {arch}"
    return None


@functools.cache
def _compiles(source: Path, arch: str, defines: _Defines) -> Reason:
    reason = available(arch)
    if reason is not None:
        return reason
    try:
        _cubin(source, arch, defines)
    except CompileError as error:
        return f"{source.name} does not compile: {error}"
    return None


def compiles(source: Path, arch: str, defines: Mapping[str, object] | None = None) -> Reason:
    """Why a source does not compile here, without loading it: what an implementation's `available` returns."""
    return _compiles(source, arch, _freeze(defines))


def load(source: Path, name: str, arch: str, defines: Mapping[str, object] | None = None) -> Kernel:
    """A kernel of a source, compiled for `arch` with `-Dname=value` for each define.

    Raises CompileError with NVRTC's log, RuntimeError for an error of the driver (an unknown kernel name among them).
    """
    return _kernel(source, name, arch, _freeze(defines))


def load_all(source: Path, name: str, arch: str, variants: Sequence[Mapping[str, object]]) -> list[Kernel]:
    """`load` with the defines of each variant, side by side: compiling one takes seconds where no cache has it."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda defines: load(source, name, arch, defines), variants))


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[object],
    *,
    shared_bytes: int = 0,
    pdl: bool = False,
    device: torch.device | None = None,
) -> None:
    """Enqueue a kernel on torch's current stream of `device` (default: the first tensor argument's).

    args, in the order of the kernel's parameters: a tensor or None for a pointer, int for a 32-bit int, float for a
    32-bit float, any ctypes value or structure for itself (`ctypes.c_longlong(n)`).
    shared_bytes: dynamic shared memory per block. pdl: programmatic dependent launch, the kernel may start before its
    predecessor on the stream ends, and must execute `griddepcontrol.wait` before it reads the predecessor's output.
    Where the tensors are on `meta`, nothing is launched: the call only loads its kernels.
    """
    from cuda.bindings import driver

    index = _device_index(args, device)
    if index is None:
        return
    if shared_bytes > _DEFAULT_SHARED_BYTES:
        _allow_shared(kernel, shared_bytes, index)
    values = [_as_ctype(value) for value in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared_bytes
    config.hStream = torch.cuda.current_stream(index).cuda_stream
    if pdl:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1

    context = _primary_context(index)
    switch = int(_check(driver.cuCtxGetCurrent(), driver)) != int(context)
    if switch:
        _check(driver.cuCtxPushCurrent(context), driver)
    try:
        # A CUkernel may stand where a CUfunction is expected; it then runs in the current context.
        function = driver.CUfunction(int(kernel.handle))
        _check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0), driver)
    finally:
        if switch:
            _check(driver.cuCtxPopCurrent(), driver)


def cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nsa_backend_plugin" / "cubin"


def _freeze(defines: Mapping[str, object] | None) -> _Defines:
    return tuple(sorted((defines or {}).items()))


def _as_ctype(value: object) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, int):
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"args contains {value}: expected a 32-bit int (wrap a 64-bit one in ctypes.c_longlong)")
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, (ctypes._SimpleCData, ctypes.Structure)):
        return value
    raise ValueError(f"args contains {value!r}: expected a tensor, None, int, float or ctypes value")


def _device_index(args: Sequence[object], device: torch.device | None) -> int | None:
    """Of the device to launch on; None for `meta`."""
    if device is None:
        device = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cuda"))
    if device.type == "meta":
        return None
    if device.type != "cuda":
        raise ValueError(f"device={str(device)!r}: expected a cuda device")
    return torch.cuda.current_device() if device.index is None else device.index


def _check(result: Sequence[Any], library: Any) -> Any:
    """The value of a cuda.bindings call, which returns (error, value...)."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"{library.__name__.rsplit('.', 1)[-1]}: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def _nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    return ".".join(map(str, _check(nvrtc.nvrtcVersion(), nvrtc)))


def _target(arch: str) -> str:
    """From Hopper on, the architecture-specific target: the cubin runs on the GPU it is compiled for anyway."""
    return f"{arch}a" if int(arch[3:]) >= 90 else arch


def _options(source: Path, arch: str, defines: _Defines) -> list[str]:
    flags = [f"-D{name}={value}" for name, value in defines]
    flags.append("--device-as-default-execution-space")  # NVRTC 13.0 takes generic lambdas for the host
    return ["--std=c++17", f"--gpu-architecture={_target(arch)}", f"-I{source.parent}", f"-I{_SHARED}", *flags]


def _cubin(source: Path, arch: str, defines: _Defines) -> bytes:
    """The compiled source, from the disk cache if it is there."""
    text = source.read_bytes()
    headers = b"".join(
        path.read_bytes() for folder in (source.parent, _SHARED) for path in sorted(folder.glob("*.cuh"))
    )
    options = _options(source, arch, defines)
    portable = [o for o in options if not o.startswith("-I")]
    key = hashlib.sha256(b"\0".join([text, headers, repr(portable).encode(), _nvrtc_version().encode()])).hexdigest()
    path = cache_dir() / f"{source.stem}-{arch}-{key[:24]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        cubin = _compile(text, source.name, options)
        _write(path, cubin)
        return cubin


def _write(path: Path, data: bytes) -> None:
    """Write through a temporary name, so that a process beside this one never reads half a file."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        logger.warning("cannot cache %s, it is compiled again in every process: %s", path, error)


def _compile(text: bytes, name: str, options: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], []), nvrtc)
    try:
        encoded = [option.encode() for option in options]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if int(result) != 0:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), nvrtc)
            _check(nvrtc.nvrtcGetProgramLog(program, log), nvrtc)
            raise CompileError(f"{result.name}: {log.decode(errors='replace').strip(chr(0)).strip()}")
        cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), nvrtc)
        _check(nvrtc.nvrtcGetCUBIN(program, cubin), nvrtc)
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@functools.cache
def _library(source: Path, arch: str, defines: _Defines) -> Any:
    from cuda.bindings import driver

    torch.cuda.init()
    cubin = _cubin(source, arch, defines)
    return _check(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), driver)


@functools.cache
def _kernel(source: Path, name: str, arch: str, defines: _Defines) -> Kernel:
    from cuda.bindings import driver

    library = _library(source, arch, defines)
    return Kernel(name, _check(driver.cuLibraryGetKernel(library, name.encode()), driver))


@functools.cache
def _primary_context(index: int) -> Any:
    """The context that torch uses on a device. Retained for the life of the process, as torch does itself."""
    from cuda.bindings import driver

    return _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(index), driver)), driver)


@functools.cache
def _allow_shared(kernel: Kernel, shared_bytes: int, index: int) -> None:
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    device = _check(driver.cuDeviceGet(index), driver)
    _check(driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, device), driver)
