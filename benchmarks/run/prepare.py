"""Compile what a sweep needs before anything is timed, in several processes side by side.

Triton, NVRTC, TileLang, DeepGEMM, FlashInfer and SGLang keep what they compiled on disk, where the measuring process
finds it. On a bare GPU host that is minutes of compilation, one kernel after the other, less in the sweep.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from benchmarks.run.child import LATE, Child
from benchmarks.run.sweep import Row
from benchmarks.schema import Settings

#: Backends whose compilation takes longest start first.
SLOW = ("flashinfer", "tilelang", "sglang_tilelang")
#: Rows that one process takes at a time.
PART = 40


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """What one process does in one go: rows of one workload and backend, which share kernels. Longest work first."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.case.workload, row.backend), {}).setdefault(row.key(), row)
    parts = []
    for (_, backend), group in found.items():
        all_of_it = list(group.values())
        # Slow compilers lock: a second process would only wait.
        size = len(all_of_it) if backend in SLOW else PART
        parts += [all_of_it[i : i + size] for i in range(0, len(all_of_it), size)]
    return sorted(parts, key=lambda part: (part[0].backend not in SLOW, -len(part)))


def compile_all(rows: Sequence[Row], device: str, jobs: int, seconds: float) -> str:
    """Run every row once, untimed, until all are done or the time is up. Returns a line that says how far it came."""
    started = time.monotonic()
    deadline = started + seconds
    waiting: queue.SimpleQueue[list[Row]] = queue.SimpleQueue()
    for group in groups(rows):
        waiting.put(group)
    done: list[str] = []
    settings = Settings().model_dump()

    def work() -> None:
        with Child(grace_s=0.0) as child:
            while time.monotonic() < deadline:
                try:
                    group = waiting.get_nowait()
                except queue.Empty:
                    return
                for row in group:
                    job = {"device": device, "settings": settings, "row": row.job(), "compile_only": True}
                    if time.monotonic() >= deadline or child.run(job, lambda event: None, deadline) == LATE:
                        return
                    done.append(row.key())

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"compiled for {len(done)} rows in {time.monotonic() - started:.0f} s with {jobs} processes"
