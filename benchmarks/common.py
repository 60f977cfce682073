"""The suite's public types: BenchmarkConfig, BenchmarkResult and ResultsFormatter."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from benchmarks.backends import is_peer
from benchmarks.checked import BatchSpec, Count, Heads
from benchmarks.workloads import workload
from benchmarks.workloads.base import HEAD_DIM

OK = "ok"
ERROR = "error"
UNAVAILABLE = "unavailable"


@checked_dataclass
class BenchmarkConfig:
    """One measurement of one backend on one batch. Raises pydantic.ValidationError, a ValueError, for bad values.

    num_layers: layers whose caches are walked through in turn, each with its own inputs (at least; more are used
    where the data would otherwise stay in the L2 cache). Times are per layer.
    """

    backend: str
    batch_spec: BatchSpec
    num_layers: Count = 10
    head_dim: Count = HEAD_DIM
    num_q_heads: Heads = 128
    num_kv_heads: Heads = 1
    block_size: Count = 64
    device: str = "cuda:0"
    repeats: Count = 9
    warmup_iters: int = Field(default=3, ge=0)
    profile_memory: bool = False


@dataclass
class BenchmarkResult:
    """One row: what was measured, the times in microseconds, and how they compare.

    status: "ok"; "error" (failed or wrong, `reason` says how; no time is reported); "unavailable" (cannot run here).
    distance: to the reference, which `checked` describes. spread: interquartile range over the median.
    floor_us: bytes over the read bandwidth measured in the same run. vs_peer: time over the best peer's.
    speedup: the baseline backend's time over this one's. reduction: percent of the baseline's time that is saved.
    wall_s: what the row cost in all, inputs, compilation, check and timing.
    """

    workload: str
    params: dict[str, Any]
    backend: str
    status: str = OK
    reason: str = ""
    median_us: float | None = None
    mean_us: float | None = None
    std_us: float | None = None
    min_us: float | None = None
    max_us: float | None = None
    spread: float | None = None
    samples: int = 0
    calls_per_sample: int = 0
    method: str = ""
    distance: float | None = None
    bar: float | None = None
    checked: str = ""
    bytes: int = 0
    flops: int = 0
    gbps: float | None = None
    tflops: float | None = None
    floor_us: float | None = None
    floor_percent: float | None = None
    best_peer: str = ""
    vs_peer: float | None = None
    speedup: float | None = None
    reduction: float | None = None
    target_us: float | None = None
    target_vs_peer: float | None = None
    peak_memory_mib: float | None = None
    wall_s: float | None = None
    note: str = ""

    @property
    def mean_time(self) -> float:
        """Mean seconds of one call; raises RuntimeError for a row without a time."""
        if self.mean_us is None:
            raise RuntimeError(f"{self.backend} has no time: {self.status}: {self.reason}")
        return self.mean_us / 1e6

    @property
    def success(self) -> bool:
        return self.status == OK

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchmarkResult:
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known)


def job_key(result: BenchmarkResult) -> str:
    """Rows with the same key do the same job and may be compared: all parameters but the cache format."""
    ignored = workload(result.workload).same_job
    params = {k: v for k, v in workload(result.workload).complete(result.params).items() if k not in ignored}
    return json.dumps([result.workload, params], sort_keys=True)


def add_comparisons(results: Sequence[BenchmarkResult], read_gbps: float | None, baseline: str = "") -> None:
    """Fill GB/s, TFLOP/s, the floor and the ratios to the best peer and to the baseline backend, in place."""
    best: dict[str, BenchmarkResult] = {}
    base: dict[str, float] = {}
    for row in results:
        if row.median_us:
            row.gbps = row.bytes / row.median_us / 1e3
            row.tflops = row.flops / row.median_us / 1e6
            if read_gbps:
                row.floor_us = row.bytes / read_gbps / 1e3
                row.floor_percent = 100 * row.floor_us / row.median_us
            if is_peer(row.backend, row.workload):
                key = job_key(row)
                if key not in best or row.median_us < (best[key].median_us or 0):
                    best[key] = row
            if row.backend == baseline:
                base.setdefault(job_key(row), row.median_us)
    for row in results:
        peer = best.get(job_key(row))
        if peer is not None and peer.median_us and row.median_us:
            row.best_peer = label(peer, row)
            row.vs_peer = row.median_us / peer.median_us
        before = base.get(job_key(row))
        if before and row.median_us:
            row.speedup, row.reduction = before / row.median_us, 100 * (1 - row.median_us / before)


def label(peer: BenchmarkResult, row: BenchmarkResult) -> str:
    """A peer's name, with the cache format where it is not the row's own."""
    other = [str(peer.params[k]) for k in workload(row.workload).same_job if peer.params.get(k) != row.params.get(k)]
    return f"{peer.backend} ({', '.join(other)})" if other else peer.backend


def describe(result: BenchmarkResult) -> str:
    """The parameters that differ from the workload's defaults, and the leading ones always."""
    kind = workload(result.workload)
    hidden = {"pool_slots", "pool_pages", "min_sets"}
    shown = {k: v for k, v in result.params.items() if k not in hidden and (k in _LEADING or v != kind.defaults.get(k))}
    return " ".join(f"{k}={v}" for k, v in shown.items())


_LEADING = ("batch_spec", "tokens", "batch", "rows", "context", "heads", "kv", "layout", "dtype", "page_size")


def write(path: str | Path, content: str | bytes, force: bool = False) -> None:
    """Write a whole file under a temporary name and give it its own, so that a kill leaves no half a file. Raises
    FileExistsError where it exists, unless forced."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if force:
            partial.replace(path)
        else:
            os.link(partial, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists (--force replaces it)") from None
    finally:
        partial.unlink(missing_ok=True)


@dataclass
class ResultsFormatter:
    """Files of results. environment and ceilings go into the JSON."""

    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    config: str = ""
    baseline: str = ""
    complete: bool = False

    #: What every line of a CSV file says of its run.
    CSV_ENVIRONMENT = ("device", "driver", "libraries", "commit", "sources", "date", "command")

    def save_csv(self, results: Sequence[BenchmarkResult], path: str | Path, force: bool = False) -> None:
        """One line per row; every parameter of any workload is a column, and so is what the run was measured on. See
        `write`."""
        params = list(dict.fromkeys(name for r in results for name in r.params))
        env = {name: self.environment.get(name, "") for name in self.CSV_ENVIRONMENT}
        if isinstance(env["libraries"], Mapping):
            env["libraries"] = ", ".join(f"{k} {v}" for k, v in env["libraries"].items())
        plain = [name for name in BenchmarkResult.__dataclass_fields__ if name != "params"]
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow([*plain, *(f"param.{p}" for p in params), *(f"environment.{name}" for name in env)])
        for r in results:
            values = r.as_dict()
            writer.writerow([*(values[name] for name in plain), *(r.params.get(p) for p in params), *env.values()])
        write(path, file.getvalue(), force)

    def save_json(self, results: Sequence[BenchmarkResult], path: str | Path, force: bool = False) -> None:
        """Environment, ceilings and one line per row, whose fields are left out where they have their default. See
        `write`."""
        head = {
            "config": self.config,
            "complete": self.complete,
            "baseline": self.baseline,
            "environment": self.environment,
            "ceilings": self.ceilings,
        }
        lines = ",\n".join("  " + json.dumps(_compact(r)) for r in results)
        write(path, json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n', force)


def load_json(path: str | Path) -> tuple[ResultsFormatter, list[BenchmarkResult]]:
    """A file written by `ResultsFormatter.save_json`."""
    content = json.loads(Path(path).read_text())
    formatter = ResultsFormatter(
        environment=content["environment"],
        ceilings=content["ceilings"],
        config=content["config"],
        baseline=content["baseline"],
        complete=content["complete"],
    )
    return formatter, [BenchmarkResult.from_dict(row) for row in content["rows"]]


def _compact(row: BenchmarkResult) -> dict[str, Any]:
    """Fields that differ from their default, six digits of every number."""
    defaults = {name: field.default for name, field in BenchmarkResult.__dataclass_fields__.items()}
    values = {k: v for k, v in row.as_dict().items() if k == "status" or v != defaults[k]}
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
