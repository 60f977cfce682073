"""Plugins of SGLang that a test gives the servers it starts."""

from __future__ import annotations

import multiprocessing
from pathlib import Path


def declare(folder: Path, name: str, function: str) -> None:
    """With the folder on PYTHONPATH, SGLang calls "module:function" when it loads its plugins."""
    info = folder / f"{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {function}\n")


def fork() -> None:
    """A plugin: SGLang forks its processes, which so need not import again what its first one has."""
    multiprocessing.set_start_method = lambda method, force=False: None  # a new interpreter each is what it asks for
    assert multiprocessing.get_start_method() == "fork"
