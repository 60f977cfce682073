"""Copies of installed SGLang releases that the patch tests may change; the installed ones are never touched.

    python -m tests.sglang_copies FOLDER

makes FOLDER/sglang, the interpreter's SGLang with every patch applied: with PYTHONPATH=FOLDER it is the one imported.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from nsa_backend_plugin import patching

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
RELEASES = {release.name: release for release in patching.releases(PATCHES)}


def touched(release: str) -> list[str]:
    """Every file that a patch of the release changes."""
    return [file for hashes in RELEASES[release].index.values() for file in hashes]


def copy_files(package: Path, folder: Path, files: Iterable[str]) -> Path:
    """A folder with nothing but copies of some files of the package."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / file, folder / file)
    return folder


def overlay(package: Path, folder: Path, files: Iterable[str]) -> Path:
    """The whole package as links, but for real copies of some files, which may be changed."""
    wanted = set(files)
    parents = {str(parent) for file in wanted for parent in Path(file).parents}

    def link(relative: Path) -> None:
        (folder / relative).mkdir()
        for entry in (package / relative).iterdir():
            path = relative / entry.name
            if str(path) in parents:
                link(path)
            elif str(path) in wanted:
                shutil.copy(entry, folder / path)
            elif entry.name != "__pycache__":
                (folder / path).symlink_to(entry)

    link(Path())
    return folder


def patched_overlay(folder: Path) -> str:
    """Make `folder`/sglang, this interpreter's SGLang with every patch applied; returns the release."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None, "SGLang is not installed"
    [package] = map(Path, spec.submodule_search_locations or ())
    release = patching.find_release(PATCHES, package)
    copy = overlay(package, folder / "sglang", touched(release.name))
    patching.write(patching.plan(release, list(release.index), copy, patching.AFTER))
    return release.name


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    print(f"SGLang {patched_overlay(target)} with every patch in {target}")
