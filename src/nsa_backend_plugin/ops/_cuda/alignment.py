"""What a kernel that loads 16 bytes at a time asks of its arguments."""

from __future__ import annotations

from typing import Any

from nsa_backend_plugin.ops.call import Reason


def declines(call: Any, *names: str) -> Reason:
    """Which tensor of a call has a row that does not begin on a multiple of 16 bytes; None without one."""
    for name in names:
        value = getattr(call, name, None)
        if value is None or value.is_meta:
            continue
        if value.data_ptr() % 16 or any(stride * value.element_size() % 16 for stride in value.stride() if stride != 1):
            return f"{name} does not lie on multiples of 16 bytes"
    return None
