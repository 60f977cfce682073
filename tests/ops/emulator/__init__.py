"""CUDA C++ on a CPU: `emulated` puts ours under the launcher that the operations use; `build` and `run` take any.

g++ compiles a kernel's source and headers as they are, on `gpu.h`, which runs a cluster's threads as fibers. Of ptx.cuh
and wgmma.cuh the functions that are PTX are left out; `ptx.h` has them for a CPU, and what it lacks does not compile.
`tilelang.h` has what TileLang's code calls.
It shows right addresses, waits and sums; no speed, no registers, and not what hardware asks of its asynchronous proxy.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_backend_plugin.ops._cuda import jit

ARCH = "sm_90"
HEADERS = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-fPIC", "-shared")
_SHARED = re.compile(r"(?:extern )?__shared__ __align__\(\d+\) ([\w ]+?) (\w+)\[(\d*)\];")
_KERNEL = r'extern "C" __global__ void[^{{]*?\b{name}\(([^)]*)\)'

Defines = tuple[tuple[str, object], ...]


def without_ptx(header: str) -> str:
    """A header without its functions that are PTX, each of which ends with a brace that begins a line or ends one."""
    kept: list[str] = []
    lines = iter(header.splitlines())
    for line in lines:
        function = [line]
        if line.startswith("template"):
            function.append(next(lines))
        if function[-1].startswith("DEVICE"):
            while not (function[-1] == "}" or (len(function) < 3 and function[-1].endswith("}"))):
                function.append(next(lines))
            if any(re.search(r"\basm\b", part) for part in function):
                continue
        kept += function
    return "\n".join(kept)


def translated(text: str) -> str:
    return _SHARED.sub(r"\1* \2 = gpu::shared_array<\1>(\3);", text)


def parameters(source: str, name: str) -> list[list[str]]:
    """Type and name of each of a kernel's parameters."""
    found = re.search(_KERNEL.format(name=name), source)
    assert found is not None, f"no kernel {name}"
    return [part.strip().rsplit(" ", 1) for part in found[1].split(",")]


@functools.cache
def _folders() -> Iterator[Path]:
    kept = tempfile.TemporaryDirectory(prefix="emulated-gpu-")  # until this process ends
    return (Path(kept.name) / str(number) for number in itertools.count())


def build(name: str, text: str, headers: Mapping[str, str] | None = None, defines: Defines = ()) -> ctypes.CDLL:
    """A kernel of a C++ text and its headers, for `run`."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = next(_folders())
    folder.mkdir()
    for header, content in (headers or {}).items():
        (folder / header).write_text(translated(content))
    values = ", ".join(f"*({kind}*)arguments[{i}]" for i, (kind, _) in enumerate(parameters(text, name)))
    file = folder / f"{name}.cpp"
    file.write_text(
        f"{translated(text)}\nstatic void** arguments;\nstatic void call() {{ {name}({values}); }}\n"
        'extern "C" const char* launch(void** values, const gpu::Range* tensors, int count, gpu::Index grid,\n'
        "                              gpu::Index block, unsigned seed) {\n"
        "  arguments = values;\n  gpu::readable.assign(tensors, tensors + count);\n"
        "  return gpu::run(grid, block, seed, call);\n}\n"
    )
    built = file.with_suffix(".so")
    flags = [f"-D{key}={value}" for key, value in defines]
    subprocess.run(["g++", *OPTIONS, *flags, f"-I{HEADERS}", str(file), "-o", str(built)], check=True)
    made = ctypes.CDLL(str(built))
    made.launch.restype = ctypes.c_char_p
    return made


class _Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


def run(
    what: object,
    library: ctypes.CDLL,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[object],
    tensors: Sequence[torch.Tensor] = (),
) -> None:
    """tensors: contiguous, and all that may be read of global memory asynchronously or in 16 bytes; none: anything."""
    values = [jit._as_ctype(value) for value in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    assert all(t.is_contiguous() for t in tensors)
    ends = [end for t in tensors for end in (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())]
    ranges, seed = (ctypes.c_void_p * len(ends))(*ends), random.getrandbits(31)
    failure = library.launch(pointers, ranges, len(tensors), _Index(*grid), _Index(*block), ctypes.c_uint(seed))
    assert failure is None, f"{what}: {failure.decode()} (seed {seed})"


@functools.cache
def library(source: Path, name: str, defines: Defines) -> ctypes.CDLL:
    headers = {}
    for header in itertools.chain(source.parent.glob("*.cuh"), Path(jit.__file__).parent.glob("*.cuh")):
        text = header.read_text()
        headers[header.name] = f'#include "ptx.h"\n{without_ptx(text)}' if "asm" in text else text
    return build(name, source.read_text(), headers, defines)


@dataclasses.dataclass(frozen=True)
class Kernel:
    source: Path
    name: str
    defines: Defines


def _load(source: Path, name: str, arch: str, defines: Mapping[str, object] | None = None) -> Kernel:
    return Kernel(source, name, tuple(sorted((defines or {}).items())))


def _launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[object],
    **_: Any,
) -> None:
    run(kernel, library(kernel.source, kernel.name, kernel.defines), grid, block, args)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run here, of calls whose `arch` is ARCH."""
    monkeypatch.setattr(jit, "available", lambda arch: None)
    monkeypatch.setattr(jit, "compiles", lambda *_: None)
    monkeypatch.setattr(jit, "load", _load)
    monkeypatch.setattr(jit, "launch", _launch)
