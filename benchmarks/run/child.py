"""A measuring process: runs jobs of `worker.py`, and is started again after a crash.

It outlives a job, so that several configurations pay once for starting Python, torch and the kernel libraries.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.run import environment, worker

#: Longest silence of a child: one row with all its compilation.
ROW_TIMEOUT_S = 180.0
#: How long past the deadline a row that has started may still take.
GRACE_S = 20.0
#: For the last words of a child that died, which a process of its own may keep from ending.
LAST_WORDS_S = 5.0
LATE = "stopped by the deadline"


class Child:
    """Context manager; the process starts with the first job and ends with the context."""

    def __init__(self, command: Sequence[str] = ("-m", worker.__name__), grace_s: float = GRACE_S):
        self.command, self.grace_s = command, grace_s
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def run(
        self, job: dict[str, Any], on_event: Callable[[dict[str, Any]], None], deadline: float | None = None
    ) -> str | None:
        """Run one job. Returns None when it is done, or when its row was reported and lost the device; otherwise why
        it has no result. A job still running `grace_s` after the deadline is stopped, and then LATE is returned."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        while True:
            wait = ROW_TIMEOUT_S if deadline is None else min(ROW_TIMEOUT_S, deadline + self.grace_s - time.monotonic())
            try:
                line = self._lines.get(timeout=max(1.0, wait))
            except queue.Empty:
                self.stop()
                late = deadline is not None and time.monotonic() >= deadline
                return LATE if late else f"no result within {ROW_TIMEOUT_S:.0f} s"
            if line is None:
                return self._ended()
            event = json.loads(line)
            if event["event"] == "done":
                return None
            on_event(event)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                [sys.executable, *self.command],
                env=environment.of_children(),
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                text=True,
            )
            self._lines, self._errors = queue.Queue(), []
            threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()
            self._reader = threading.Thread(target=_keep, args=(self._process.stderr, self._errors), daemon=True)
            self._reader.start()
        return self._process

    def _ended(self) -> str | None:
        assert self._process is not None
        assert self._reader is not None
        code = self._process.wait()
        self._reader.join(LAST_WORDS_S)
        self._process = None
        if code == worker.CONTEXT_LOST:
            return None
        return f"the process ended with code {code}: {' '.join(''.join(self._errors[-3:]).split())[-300:]}"


def _forward(stream, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _keep(stream, errors: list[str]) -> None:
    """Last lines of a child's stderr, for the reason of a crash."""
    for line in stream:
        errors.append(line)
        del errors[:-40]
