"""Plugins of SGLang that a test gives the servers it starts."""

from __future__ import annotations

from pathlib import Path


def declare(folder: Path, name: str, function: str) -> None:
    """With the folder on PYTHONPATH, SGLang calls "module:function" when it loads its plugins."""
    info = folder / f"{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {function}\n")
