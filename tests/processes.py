"""What became of a process."""

from __future__ import annotations

from pathlib import Path


def gone(pid: int) -> bool:
    """Ended, or a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
