"""Which implementations of an operation a test runs, beside the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nsa_backend_plugin.ops.registry import Operation


def others(operation: str) -> list[str]:
    """Names of all implementations of "op.function" but the reference."""
    return [name for name in Operation.all[operation].implementations() if name != "torch"]


def run(function: Callable, impl: str, *args: Any, **kwargs: Any) -> Any:
    """Call with a forced implementation; skip where a vendor's declines. Triton must take every call of the tests."""
    try:
        return function(*args, impl=impl, **kwargs)
    except ValueError as error:
        if impl != "triton" and "forced implementation cannot run" in str(error):
            pytest.skip(str(error))
        raise
