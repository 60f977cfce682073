"""Programmatic dependent launch of Triton kernels: a kernel starts while its predecessor on the stream still runs.

From sm_90 on. Such a kernel touches no memory before `await_predecessor`, which returns once the predecessor has ended
and its writes are visible; what is saved is the time from the end of one kernel to the start of the next, about a
microsecond. Its own successor may then start early too.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from nsa_backend_plugin.ops.arch import launches_early


def options(arch: str) -> dict[str, Any]:
    """Launch arguments of a kernel that with its constant EARLY waits first: `await_predecessor`, or its `gdc_wait`."""
    return {"EARLY": True, "launch_pdl": True} if launches_early(arch) else {"EARLY": False}


@triton.jit
def await_predecessor(EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
