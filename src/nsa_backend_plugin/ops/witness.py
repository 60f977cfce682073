"""A witness beside the implementation that serves: the torch reference on a few rows of every n-th call.

`NSA_PLUGIN_WITNESS="sparse_mla.attend"` names the functions to watch. A row that differs by more than the function's
bar is logged with its position, and the call, cut to the sampled rows and what they read, is saved to
NSA_PLUGIN_WITNESS_DIR: `nsa-plugin replay FILE --impl aiter triton torch` repeats it anywhere.

A captured graph runs no Python when it is replayed: start with --disable-cuda-graph to watch every step.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from nsa_backend_plugin import settings
from nsa_backend_plugin.ops.call import Call, capturing

logger = logging.getLogger(__name__)

EVERY = 64
ROWS = 4
#: Mismatches saved by one process: a broken kernel must not fill a disk.
MOST_FILES = 8
_files = itertools.count()


def watched() -> Sequence[str]:
    """Names of the functions to watch, as "operation.function"."""
    names = settings.get("NSA_PLUGIN_WITNESS")
    assert isinstance(names, tuple)
    return names


def row_distance(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[rows] float64, 1 - 2*sum(x*y) / sum(x*x + y*y) of each row (all dimensions but the first).

    0 for equal rows. Infinite and NaN values must be equal, in their places, else the distance is 2.
    """
    x, y = (t.detach().double().reshape(t.shape[0], -1) for t in (actual, expected))
    finite = torch.isfinite(x) & torch.isfinite(y)
    alike = finite | (x == y) | (x.isnan() & y.isnan())
    x, y = x.where(finite, 0), y.where(finite, 0)
    size = (x * x + y * y).sum(1)
    distance = torch.where(size > 0, 1 - 2 * (x * y).sum(1) / size, 0.0)
    return torch.where(alike.all(1), distance, 2.0)


class Witness:
    """Watches one public function of this process."""

    def __init__(self, operation: str, reference: Any):
        self.operation = operation
        self.reference = reference
        self.calls = 0

    def look(self, implementation: str, call: Call, result: Any) -> None:
        """Compare a finished call with the reference, when it is its turn."""
        if capturing(call.device):
            return
        turn, self.calls = self.calls % EVERY == 0, self.calls + 1
        count = call.row_count()
        if not turn or count == 0:
            return
        rows = torch.randperm(count)[:ROWS].sort().values
        part = call.of_rows(rows.to(call.device))
        expected = part.comparable(self.reference(part))
        actual = part.comparable(_rows_of(result, rows.to(call.device)))
        worst = max((d, int(rows[i])) for i, d in enumerate(row_distance(actual, expected).tolist()))
        if worst[0] <= call.bar:
            return
        path = self._save(implementation, part)
        logger.error(
            "nsa_plugin witness: %s by %s: row %d of %d differs from torch by %.2e, more than %.1e (%s)%s",
            *(self.operation, implementation, worst[1], count, worst[0], call.bar),
            " ".join(f"{k}={v}" for k, v in call.facts().items()),
            f"; saved as {path}" if path else "",
        )

    def _save(self, implementation: str, part: Call) -> Path | None:
        if next(_files) >= MOST_FILES:
            return None
        folder = Path(str(settings.get("NSA_PLUGIN_WITNESS_DIR")))
        path = folder / f"{self.operation}-{implementation}-{os.getpid()}-{time.time_ns()}.pt"
        try:
            save(path, self.operation, implementation, part)
        except OSError as error:
            logger.error("nsa_plugin witness: cannot save %s: %s", path, error)
            return None
        return path


def _rows_of(result: Any, rows: torch.Tensor) -> Any:
    return tuple(r[rows] for r in result) if isinstance(result, tuple) else result[rows]


def save(path: Path, operation: str, implementation: str, call: Call) -> None:
    """Write a call to a file: its function, the implementation that ran it, its arguments."""
    arguments = {f.name: getattr(call, f.name) for f in fields(call) if f.name != "step"}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"operation": operation, "implementation": implementation, "arguments": arguments}, path)


def load(path: Path, device: torch.device) -> tuple[str, str, dict[str, Any]]:
    """(function, implementation, arguments) of a file, its tensors on a device. Runs no code of the file."""
    saved = torch.load(path, map_location=device, weights_only=True)
    return saved["operation"], saved["implementation"], saved["arguments"]
