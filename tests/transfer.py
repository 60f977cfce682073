"""What moves caches between servers of a host: Mooncake's transfer engine over TCP, and the Debian libraries it loads.

    python -m tests.transfer

prints the variables of a server that can load it, for a shell.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from nsa_backend_plugin.serving import HOST

ROOT = Path(__file__).resolve().parents[1]
#: Debian's package by library, each needed by the one before it; `mooncake/engine.so` is linked with the first.
LIBRARIES = {
    "libibverbs.so.1": "libibverbs1",
    "libnl-route-3.so.200": "libnl-route-3-200",
    "libnl-3.so.200": "libnl-3-200",
}
_CACHE = ROOT / ".build" / "transfer"


class Missing(RuntimeError):
    """Something is not installed and cannot be fetched; the message says what, and how to install it."""


@functools.cache
def environment() -> dict[str, str]:
    """Variables for servers that transfer over TCP. Raises Missing."""
    require("mooncake", "mooncake-transfer-engine-non-cuda (on a GPU mooncake-transfer-engine-cuda13)")
    folders = [] if _installed() else sorted({str(path.parent) for path in _fetched().rglob("lib*.so*")})
    paths = os.pathsep.join(filter(None, [*folders, os.environ.get("LD_LIBRARY_PATH")]))
    # A host without a network has no address that SGLang finds.
    return {"MC_FORCE_TCP": "1", "SGLANG_HOST_IP": HOST, **({"LD_LIBRARY_PATH": paths} if paths else {})}


def require(module: str, wheel: str) -> None:
    """Raises Missing."""
    if importlib.util.find_spec(module) is None:
        raise Missing(f"the module {module} is missing: `make setup-test`, or {sys.executable} -m pip install {wheel}")


def _installed() -> bool:
    try:
        for library in LIBRARIES:
            ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _fetched() -> Path:
    """A folder with Debian's packages unpacked: nothing is installed."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    target, staged = _CACHE / "root", _CACHE / "staged"
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tests of two releases run side by side
        if not target.exists():
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            try:
                _download(staged)
            except (OSError, subprocess.CalledProcessError) as error:
                words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                raise Missing(
                    f"Mooncake needs {', '.join(LIBRARIES)}, which are not installed and cannot be fetched "
                    f"({words[-1]}): apt-get install {' '.join(LIBRARIES.values())}"
                ) from None
            staged.rename(target)
    return target


def _download(folder: Path) -> None:
    """Fetch the packages and unpack them into the folder. Raises OSError, CalledProcessError."""
    fetch = ("apt-get", "download", *LIBRARIES.values())
    try:
        _run(*fetch, cwd=folder)
    except subprocess.CalledProcessError:
        if os.geteuid():
            raise
        _run("apt-get", "update")  # an image without lists of packages
        _run(*fetch, cwd=folder)
    for package in folder.glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(folder))


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=120)


if __name__ == "__main__":
    print("\n".join(f"export {name}={value}" for name, value in environment().items()))
