"""A child process that measures rows and reports each as one JSON line, so that a crash costs one row.

    python -m benchmarks.run.worker < jobs.jsonl

One job per line: {"device", "settings"} and either {"ceilings": true} or {"row": {"workload", "params", "backend"}},
which with {"compile_only": true} is run once and not timed (see prepare.py). Events on the original stdout:
{"event": "ceilings" or "row", "result": ...}, then {"event": "done"}. Everything that libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

#: Exit code that asks the parent for a fresh process: the device context is lost.
CONTEXT_LOST = 3

Emit = Callable[[dict[str, Any]], None]


def run_job(job: dict[str, Any], emit: Emit) -> None:
    """Measure the row of a job. Raises measure.ContextLost, after reporting the row, when the device is lost."""
    import torch

    from benchmarks.run.measure import ContextLost, Settings, measure
    from benchmarks.timing.clock import measure_ceilings
    from nsa_backend_plugin.ops._triton import support

    device = torch.device(job["device"])
    if device.type == "cpu" and support.available("cpu") is None:
        import tools.triton_interpreter  # noqa: F401
    if job.get("ceilings"):
        emit({"event": "ceilings", "result": asdict(measure_ceilings(device))})
        return
    row, settings = job["row"], Settings(**job["settings"])
    try:
        result = measure(
            row["workload"], row["params"], row["backend"], device, settings, job.get("compile_only", False)
        )
    except ContextLost as lost:
        emit({"event": "row", "result": lost.row.as_dict()})
        raise
    emit({"event": "row", "result": result.as_dict()})


def main() -> int:
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    for line in sys.stdin:
        from benchmarks.run.measure import ContextLost

        try:
            run_job(json.loads(line), emit)
        except ContextLost:
            # The context cannot even be destroyed cleanly; leave without running destructors.
            os._exit(CONTEXT_LOST)
        emit({"event": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
