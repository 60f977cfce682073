"""What a run ran on: versions, commit, device."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from nsa_backend_plugin import __version__

_LIBRARIES = ("sglang", "torch", "triton", "transformers")


def versions() -> dict[str, str | None]:
    """Installed versions in this process's environment (None: not installed), and this package's own with commit."""
    found: dict[str, str | None] = {"nsa-backend-plugin": __version__, "commit": commit()}
    found |= {name: installed_version(name) for name in _LIBRARIES}
    return {**found, "python": platform.python_version()}


def installed_version(distribution: str) -> str | None:
    """None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit(source: str | None = None) -> str | None:
    """Commit of the checkout that has the file `source` (None: this package), "-dirty" when files differ from it; else
    NSA_BENCH_COMMIT (set where sources travel without their history), else None."""
    source = source or __file__
    here = Path(source).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        inside = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", source], capture_output=True)
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return os.environ.get("NSA_BENCH_COMMIT")
    known = inside.returncode == 0 and done.returncode == 0
    return done.stdout.strip() if known else os.environ.get("NSA_BENCH_COMMIT")


@functools.cache
def device(name: str | None) -> str:
    """The device of a server on this machine, from its `device` argument."""
    if name in (None, "cpu"):
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
    # In a process of its own: asking takes GPU memory that the next server may need.
    ask = "import torch; print(torch.cuda.device_count(), 'x', torch.cuda.get_device_name(0))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else str(name)
