"""Records of runs that `make test` has no time for: a JSON list in docs/, an entry for each version that was tried."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def output(*command: str) -> str:
    """What a command prints, run from the repository's root."""
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def versions_and_rest(words: list[str]) -> tuple[list[str], list[str]]:
    """A command line's words before `--`, and after it."""
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def write(path: Path, keys: tuple[str, ...], entry: dict[str, Any]) -> None:
    """Put an entry, with the date and the commit, in the place of the one with the same values of `keys`."""
    made = {"date": datetime.date.today().isoformat(), "commit": output("git", "describe", "--always", "--dirty")}
    entries = json.loads(path.read_text()) if path.exists() else []
    by_key = {tuple(e[key] for key in keys): e for e in (*entries, {**entry, **made})}
    path.write_text(json.dumps([e for _, e in sorted(by_key.items())], indent=1) + "\n")
