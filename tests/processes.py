"""What becomes of processes, and how long a test waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

#: Seconds, of whatever a test starts. Four lanes and their servers share what may be two slow cores.
HANGS_AFTER = 1200.0


def wait_until(condition: Callable[[], object], seconds: float = HANGS_AFTER) -> bool:
    """Whether the condition came true. A test asserts it, and depends on no machine's speed."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def gone(pid: int) -> bool:
    """Ended, or a zombie that nobody has reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def written(path: Path, words: int) -> list[str]:
    """The first words that somebody writes into a file, each with a space or a line's end behind it, once they are
    there."""
    text = ""

    def there() -> bool:
        nonlocal text
        text = path.read_text() if path.exists() else ""
        return len(text.split()) >= words and text[-1:].isspace()

    assert wait_until(there), text
    return text.split()[:words]
