"""Measure one backend on one case: build, check against the reference, then time."""

from __future__ import annotations

import functools
import json
import time
import traceback
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks import backends, registry
from benchmarks.common import ERROR, UNAVAILABLE, BenchmarkResult
from benchmarks.schema import Settings
from benchmarks.timing.clock import time_calls
from benchmarks.workloads import Problem, workload

#: Errors after which the CUDA context answers every call with an error: only a new process helps.
_POISONED = ("illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert")


class ContextLost(Exception):
    """The device context is unusable after this row; carries the row."""

    def __init__(self, row: BenchmarkResult):
        super().__init__(row.reason)
        self.row = row


@functools.lru_cache(maxsize=1)
def _problem(name: str, params_json: str, device: torch.device) -> Problem:
    """The case's inputs, shared by the backends that are measured on it one after the other."""
    return workload(name).build(json.loads(params_json), device)


def measure(
    name: str,
    params: Mapping[str, Any],
    backend: str,
    device: torch.device,
    settings: Settings,
    compile_only: bool = False,
) -> BenchmarkResult:
    """One row. A backend that cannot run, fails or is wrong gives a row that says so instead of a time.

    compile_only: run the backend once, which compiles what it needs into the caches on disk, and measure nothing.
    """
    started = time.perf_counter()
    row = BenchmarkResult(workload=name, params=workload(name).complete(params), backend=backend)
    row.reason = backends.unavailable(backend, name, row.params, device)
    if row.reason:
        row.status = UNAVAILABLE
        return row
    try:
        problem = _problem(name, json.dumps(row.params, sort_keys=True), device)
        row.bytes, row.flops, row.checked = problem.bytes, problem.flops, problem.checked
        row.bar = problem.bar_of(backends.is_peer(backend, name))
        chosen = backends.resolve(backend, name, problem)
        if compile_only:
            chosen.run(problem.inputs[-1], False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        else:
            _check_and_time(row, problem, chosen, device, settings)
    except Exception as error:
        declined = registry.declined(error)
        row.status = UNAVAILABLE if declined else ERROR
        row.reason = " ".join((declined or f"{type(error).__name__}: {error}").split())[:400]
        if not declined:
            traceback.print_exc()
        if isinstance(error, torch.OutOfMemoryError):
            _problem.cache_clear()
            torch.cuda.empty_cache()
        if any(sign in str(error) for sign in _POISONED):
            raise ContextLost(row) from error
    row.wall_s = time.perf_counter() - started
    return row


def _check_and_time(
    row: BenchmarkResult, problem: Problem, backend: backends.Backend, device: torch.device, settings: Settings
) -> None:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    out = backend.run(problem.inputs[-1], True)  # before the reference runs, whose result could lie in stale memory
    if on_gpu:
        torch.cuda.synchronize(device)
        if settings.profile_memory:
            row.peak_memory_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    row.distance = problem.check(out, problem.inputs[-1])
    del out
    bar = problem.bar_of(backends.is_peer(backend.name, row.workload))
    if not row.distance <= bar:
        row.status = ERROR
        row.reason = f"wrong result: distance {row.distance:.2e} to the reference, at most {bar:.1e} expected"
        return
    calls = [functools.partial(backend.run, item, False) for item in problem.inputs]
    timing = time_calls(
        calls, device, repeats=settings.repeats, warmup_iters=settings.warmup_iters, budget_s=settings.budget_s
    )
    for field, value in timing.as_dict().items():
        setattr(row, field, value)
