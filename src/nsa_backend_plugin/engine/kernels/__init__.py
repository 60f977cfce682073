"""Implementations of operations that are reachable only through sglang, and so may not live under ops/."""

from __future__ import annotations

from nsa_backend_plugin.ops import dispatch


def register() -> None:
    """Make them known to the dispatcher. Imports none of them; calling it again changes nothing."""
    dispatch.register_external("topk", "sglang_topk_v2", f"{__name__}.sglang_topk_v2")
