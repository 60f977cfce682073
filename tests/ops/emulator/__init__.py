"""Our CUDA C++ on a CPU: `emulated` puts it under the launcher that the operations use.

g++ compiles a kernel's source and headers as they are, on `gpu.h`, which runs a cluster's threads as fibers. Of ptx.cuh
and wgmma.cuh the functions that are PTX are left out; `ptx.h` has them for a CPU, and what it lacks does not compile.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nsa_backend_plugin.ops._cuda import jit

ARCH = "sm_90"
HEADERS = Path(__file__).parent
OPTIONS = ("-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-fPIC", "-shared")
_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) ([\w ]+?) (\w+)\[\];")
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
    return _SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(gpu::self->block->shared);", text)


def parameters(source: str, name: str) -> list[str]:
    """Types of a kernel's parameters."""
    found = re.search(_KERNEL.format(name=name), source)
    assert found is not None, f"no kernel {name}"
    return [part.strip().rsplit(" ", 1)[0] for part in found[1].split(",")]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulated-gpu-")  # until this process ends


@functools.cache
def library(source: Path, name: str, defines: Defines) -> ctypes.CDLL:
    folder = Path(_folder().name) / str(next(_number))
    folder.mkdir()
    for header in itertools.chain(source.parent.glob("*.cuh"), Path(jit.__file__).parent.glob("*.cuh")):
        text = translated(header.read_text())
        (folder / header.name).write_text(f'#include "ptx.h"\n{without_ptx(text)}' if "asm" in text else text)
    text = translated(source.read_text())
    values = ", ".join(f"*({kind}*)arguments[{i}]" for i, kind in enumerate(parameters(text, name)))
    file = folder / f"{source.stem}.cpp"
    file.write_text(
        f"{text}\nstatic void** arguments;\nstatic void call() {{ {name}({values}); }}\n"
        'extern "C" const char* launch(void** values, gpu::Index grid, gpu::Index block, unsigned seed) {\n'
        "  arguments = values;\n  return gpu::run(grid, block, seed, call);\n}\n"
    )
    built = file.with_suffix(".so")
    flags = [f"-D{key}={value}" for key, value in defines]
    subprocess.run(["g++", *OPTIONS, *flags, f"-I{HEADERS}", str(file), "-o", str(built)], check=True)
    made = ctypes.CDLL(str(built))
    made.launch.restype = ctypes.c_char_p
    return made


_number = itertools.count()


@dataclasses.dataclass(frozen=True)
class Kernel:
    source: Path
    name: str
    defines: Defines


class _Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


def _load(source: Path, names: Sequence[str], arch: str, defines: Mapping[str, object] | None = None) -> dict[str, Any]:
    return {name: Kernel(source, name, tuple(sorted((defines or {}).items()))) for name in names}


def _launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[object],
    **_: Any,
) -> None:
    values = [jit._as_ctype(value) for value in args]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    run = library(kernel.source, kernel.name, kernel.defines).launch
    seed = random.getrandbits(31)
    failure = run(pointers, _Index(*grid), _Index(*block), ctypes.c_uint(seed))
    assert failure is None, f"{kernel.name}: {failure.decode()} (seed {seed}, {dict(kernel.defines)})"


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run here, of calls whose `arch` is ARCH."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    monkeypatch.setattr(jit, "available", lambda arch: None)
    monkeypatch.setattr(jit, "compiles", lambda *_: None)
    monkeypatch.setattr(jit, "load", _load)
    monkeypatch.setattr(jit, "launch", _launch)
