"""Source of SGLang releases, from their wheels: downloaded once, never installed.

    python -m tools.wheels 0.5.23

prints the folder of that release's package `sglang` (its Python files alone).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CACHE = ROOT / ".build" / "sources"
_PLATFORM = ("--platform=manylinux_2_34_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")


def package(release: str) -> Path:
    """Folder `sglang` of a release. Raises CalledProcessError when the registry cannot be asked."""
    folder = _CACHE / release
    if not (folder / _metadata(release)).exists():
        staged = _CACHE / f"{release}.part"
        for stale in (staged, folder):
            shutil.rmtree(stale, ignore_errors=True)
        staged.mkdir(parents=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, *_PLATFORM, f"--dest={staged}", f"sglang=={release}"], check=True)
        [wheel] = staged.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py")]
            archive.extractall(staged, [*names, _metadata(release)])
        wheel.unlink()
        staged.rename(folder)
    return folder / "sglang"


def requirements(release: str) -> list[str]:
    """What the release's wheel asks for, without its extras."""
    text = (package(release).parent / _metadata(release)).read_text("utf-8")
    lines = re.findall("^Requires-Dist: (.*)$", text, re.MULTILINE)
    return [line for line in lines if "extra ==" not in line]


def _metadata(release: str) -> str:
    return f"sglang-{release}.dist-info/METADATA"


if __name__ == "__main__":
    print(package(sys.argv[1]))
