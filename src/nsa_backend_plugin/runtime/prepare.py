"""Kernels compiled before they are needed: side by side, into the caches that the next start finds.

Without it they are compiled one after the other, where each is first launched: in the loop that captures graphs, and
in the first requests.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from nsa_backend_plugin.ops.call import Call
from nsa_backend_plugin.ops.dispatch import Operation

logger = logging.getLogger(__name__)

#: Compilers that run at once: LLVM and ptxas take a core each, and a server has other processes.
MOST_WORKERS = 16
_SAY_EVERY = 10.0  # seconds


class _Counting(ThreadPoolExecutor):
    """An executor that knows how much of its work is done."""

    def __init__(self, workers: int):
        super().__init__(workers, thread_name_prefix="nsa_plugin_compile")
        self.submitted: list[Future] = []

    def submit(self, *args: Any, **kwargs: Any) -> Future:
        self.submitted.append(super().submit(*args, **kwargs))
        return self.submitted[-1]

    def done(self) -> int:
        return sum(future.done() for future in self.submitted)


def compile_kernels(made: Iterable[tuple[Operation, Call]]) -> int:
    """Compile what calls with `meta` tensors will launch on the current GPU; returns how many kernels that were.

    A kernel that cannot be compiled ahead is left to its first launch, which says why it fails.
    """
    import triton

    start = time.monotonic()
    ranks = max(1, torch.cuda.device_count())  # of this host, which may all compile now
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // ranks))
    with _Counting(workers) as pool:
        finished = threading.Event()
        speaker = threading.Thread(target=_report, args=(pool, finished, start), daemon=True)
        speaker.start()
        try:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                for operation, call in made:
                    operation.prepare(call)
        finally:
            finished.set()
    logger.info(
        "nsa_plugin compiled %d Triton kernels, or found them compiled, in %.1f s with %d threads",
        *(len(pool.submitted), time.monotonic() - start, workers),
    )
    return len(pool.submitted)


def _report(pool: _Counting, finished: threading.Event, start: float) -> None:
    while not finished.wait(_SAY_EVERY):
        seconds = time.monotonic() - start
        count = len(pool.submitted)
        logger.info("nsa_plugin compiles Triton kernels: %d of %d after %.0f s", pool.done(), count, seconds)
