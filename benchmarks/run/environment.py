"""What a result was measured on: device, driver, versions, sources, date and command."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nsa_backend_plugin
from nsa_backend_plugin.environment import commit

REPO = Path(__file__).resolve().parents[2]
RESULTS = REPO / "benchmarks" / "results"
LIBRARIES = (
    "torch",
    "triton",
    "sglang",
    "sglang-kernel",
    "sgl-kernel",
    "flashinfer-python",
    "flash-mla",
    "sgl-flash-mla",
    "deep-gemm",
    "sgl-deep-gemm",
    "tilelang",
    "amd-aiter",
    "cuda-python",
    "cuda-core",
    "apache-tvm-ffi",
)
#: What must agree for two rows to belong to one run (see `sweep.fingerprint`).
IDENTITY = ("device", "driver", "libraries", "sources")


def collect(device: str) -> dict[str, Any]:
    """The environment of a run on `device` ("cuda:0", "cpu"), without starting CUDA in this process."""
    return {
        "device": _device_name(device),
        "driver": _driver(device),
        "python": platform.python_version(),
        "libraries": _versions(),
        "commit": _commit(),
        "sources": source_digest(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line(sys.argv),
    }


def of_children() -> dict[str, str]:
    """Variables of a child process that imports this suite and the library that this process imports."""
    paths = [str(REPO), str(Path(nsa_backend_plugin.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def command_line(argv: list[str]) -> str:
    """The command as a reader would type it: paths inside the repository relative, others by name only."""
    words = []
    for word in argv:
        path = Path(word)
        if path.is_absolute():
            word = str(path.relative_to(REPO)) if path.is_relative_to(REPO) else path.name
        words.append(word)
    return " ".join(["python", *words])


def source_digest() -> str:
    """Digest of everything that can change a timing: every source file of the package that is imported, the suite
    itself, and what makes its inputs."""
    digest, package = hashlib.sha256(), Path(nsa_backend_plugin.__file__).parent
    for root, files in ((package, "**/*"), (REPO / "benchmarks", "**/*"), (REPO / "tools", "calls.py")):
        for path in sorted(p for p in root.glob(files) if p.suffix in (".py", ".cu", ".cuh", ".json") and p.is_file()):
            if RESULTS not in path.parents:
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def machine(device: str) -> str:
    """A device's name as part of a file's name: "h200", "cpu-x86_64-2-cores"."""
    name = re.sub(r"\b(nvidia|amd|instinct|graphics)\b", "", _device_name(device).lower())
    return re.sub(r"[^a-z0-9_]+", "-", name).strip("-")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """NSA_BENCH_COMMIT, which goes before where the sources travel without their history, or the commit found."""
    return os.environ.get("NSA_BENCH_COMMIT") or commit(__file__) or "unknown"


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    names = _nvidia_smi("name") or _rocm("Card Series")
    return names or "unknown GPU"


def _driver(device: str) -> str:
    if not device.startswith("cuda"):
        return "none"
    return _nvidia_smi("driver_version") or _rocm("Driver version") or "unknown"


@functools.cache
def _nvidia_smi(field: str) -> str:
    lines = _run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]).splitlines()
    return lines[0].strip() if lines else ""


def _rocm(field: str) -> str:
    for line in _run(["rocm-smi", "--showproductname", "--showdriverversion"]).splitlines():
        if field in line:
            return line.rsplit(":", 1)[-1].strip()
    return ""


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
