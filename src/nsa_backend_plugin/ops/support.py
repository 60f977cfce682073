"""The verdict of an implementation on whether it can run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    ok: bool
    reason: str = ""


YES = Support(True)


def no(reason: str) -> Support:
    return Support(False, reason)


def needs_module(name: str) -> Support:
    """Whether a top-level package is installed, without importing it."""
    return YES if importlib.util.find_spec(name) else no(f"{name} is not installed")
