"""Which implementations of an operation a test runs, beside the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_backend_plugin.ops.call import Declined
from nsa_backend_plugin.ops.dispatch import Operation
from tests.conftest import HAS_GPU

#: Written here: they must take every call of the tests, but those that a test lists.
OWN = ("triton", "cuda", "wgmma", "union", "tilelang")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
#: (operation.function, implementation, kind of data) -> the bar of a vendor's kernel that misses the common one. Its
#: adapter's docstring says why.
BARS = {
    ("dense_mla.decode", "fa3", "bf16"): 1e-5,
    ("dense_mla.decode", "flash_mla", "bf16"): 2e-5,
    ("sparse_mla.attend", "fa3", "bf16"): 1e-5,
    ("sparse_mla.attend", "flash_mla", "packed"): 1e-5,
    ("sparse_mla.attend", "flash_mla_unpacked", "packed"): 5e-5,
}


def others(operation: Operation) -> list[str]:
    """Names of all implementations of a function but the reference, available here or not."""
    return [name for name in operation.implementations() if name != "torch"]


def runnable(operation: Operation) -> list[str]:
    """Names of those that can run here. Never fewer because of a variable in the environment."""
    return [name for name in operation.available(DEVICE) if name != "torch"]


def bar(operation: Operation, impl: str, kind: str, common: float) -> float:
    """The bar of an implementation: the common one, unless that is stricter than its own."""
    return max(common, BARS.get((operation.name, impl, kind), 0.0))


def run(function: Callable, impl: str, *args: Any, may_decline: str | tuple[str, ...] = (), **kwargs: Any) -> Any:
    """Call with a forced implementation; skip where a vendor's declines.

    may_decline: what one of our own may say when it declines this call; it must take all others.
    """
    try:
        return function(*args, impl=impl, **kwargs)
    except Declined as declined:
        reason = declined.reasons[impl]
        allowed = (may_decline,) if isinstance(may_decline, str) else may_decline
        if impl not in OWN or any(words in reason for words in allowed):
            pytest.skip(f"{impl}: {reason}")
        raise
