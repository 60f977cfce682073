"""Files that a command writes: refused before the work starts, named when writing fails, whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_writable(option: str, path: Path) -> None:
    """Raises ValueError when the file of a command-line option could not be written at the end of a long run."""
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{option} {path}: expected a file, this is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} {path}: not writable")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not: a full disk is found while writing, not while opening."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, content: Any) -> None:
    """In one step: what ends the program half-way must leave nothing that a rerun cannot read."""
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
