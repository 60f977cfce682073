"""Source of the supported SGLang releases, from their wheels: downloaded once, never installed.

    python -m tests.wheels 0.5.23

prints the folder of that release's package `sglang` (its Python files alone).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Every supported release; `engine.release` has the range.
RELEASES = tuple(f"0.5.{patch}" for patch in range(17, 24))
_CACHE = ROOT / ".build" / "wheels"
#: What of the package is read.
_PARTS = ("srt", "kernels", "jit_kernel")
_PLATFORM = ("--platform=manylinux_2_34_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")


def package(release: str) -> Path:
    """Folder `sglang` of a release. Raises CalledProcessError when the registry cannot be asked."""
    folder = _CACHE / release
    if not folder.exists():
        staged = _CACHE / f"{release}.part"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, *_PLATFORM, f"--dest={staged}", f"sglang=={release}"], check=True)
        [wheel] = staged.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py") and name.split("/")[1] in _PARTS]
            archive.extractall(staged, names)
        wheel.unlink()
        staged.rename(folder)
    return folder / "sglang"


if __name__ == "__main__":
    print(package(sys.argv[1]))
