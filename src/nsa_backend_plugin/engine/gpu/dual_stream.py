"""The optional second lane of the decode schedule (`NSA_PLUGIN_DUAL_STREAM`)."""

from __future__ import annotations

import functools
import os

import torch

from nsa_backend_plugin import settings

#: Above this many tokens the kernels of one lane fill the GPU and a second lane only adds contention.
AUTO_MAX_TOKENS = 128
#: AMD's experiment flag for the same schedule (SGLang pull request 23562), understood on ROCm.
HIP_ALIAS = "SGLANG_ENABLE_HIP_DUAL_STREAM"


def enabled(tokens: int) -> bool:
    """Whether a decode step of this many tokens runs on two lanes.

    `auto` uses them inside CUDA graph capture only (eager, the host is the bottleneck and events cost more than
    they hide), and not on ROCm, where the published measurement lost 15% (SGLang pull request 23562).
    """
    choice = settings.get("NSA_PLUGIN_DUAL_STREAM")
    if choice == "auto" and torch.version.hip:
        choice = "1" if os.environ.get(HIP_ALIAS, "").lower() in ("1", "true") else "0"
    if choice == "auto":
        return tokens <= AUTO_MAX_TOKENS and torch.cuda.is_current_stream_capturing()
    return choice == "1"


class Serial:
    """The degenerate lane: everything on the current stream, in program order."""

    def fork(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...

    def join(self) -> None: ...


class SideLane(Serial):
    """Work issued inside `with lane:` runs on `side`, after everything that was issued before `fork()`."""

    def __init__(self, side: torch.cuda.Stream):
        self._main = torch.cuda.current_stream()
        self._side = side
        self._context = torch.cuda.stream(side)

    def fork(self) -> None:
        self._side.wait_stream(self._main)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)

    def join(self) -> None:
        self._main.wait_stream(self._side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Of high priority, unlike the model's: a step waits for this lane's kernels, so theirs are the free places."""
    return torch.cuda.Stream(device, priority=-1)


def side_lane(model_stream: torch.cuda.Stream | None, tokens: int) -> Serial:
    """A second lane if the schedule is on and the model has a side stream, else the serial one."""
    if model_stream is None or not enabled(tokens):
        return Serial()
    return SideLane(_side_stream(model_stream.device))
