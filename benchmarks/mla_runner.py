"""The Python API.

from benchmarks.common import BenchmarkConfig
from benchmarks.mla_runner import run_mla_benchmark

config = BenchmarkConfig(backend="flash_mla", batch_spec="64q1s4k", num_q_heads=128)
result = run_mla_benchmark("flash_mla", config, num_kv_splits=4)
print(f"{result.mean_time:.6f} s")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import backends
from benchmarks.batch_spec import parse_batch_spec
from benchmarks.common import BenchmarkConfig, BenchmarkResult, add_comparisons
from benchmarks.run.measure import measure
from benchmarks.schema import Settings
from benchmarks.timing.clock import time_calls
from benchmarks.workloads.base import HEAD_DIM

#: What MLA workloads do not take as parameters, because MLA fixes it.
MLA = {"head_dim": HEAD_DIM, "kv_heads": 1}
#: Backends of ordinary attention that have no MLA meaning.
STANDARD_ONLY = ("flash", "flashinfer")


def run_mla_benchmark(backend: str, config: BenchmarkConfig, **sweep: Any) -> BenchmarkResult:
    """Measure one backend on one batch in this process.

    sweep: parameters of the workload, such as num_kv_splits or reorder_batch_threshold.
    A batch of decodes times the decode kernel alone; any other batch, or a reorder_batch_threshold, times a whole
    attention layer with its projections (workloads/mla_batch.py). Raises ValueError for an unknown backend, a bad spec
    or parameter; a backend that fails or cannot run gives a result whose `status` and `reason` say so.
    """
    kind = choose_workload(config.batch_spec, (backend,), tuple(sweep), config.head_dim, config.num_kv_heads)
    backends.check_names([backend], [kind], "backend")
    settings = Settings(repeats=config.repeats, warmup_iters=config.warmup_iters, profile_memory=config.profile_memory)
    chosen = backends.choose([backend], kind, config.device)[0]
    result = measure(kind, parameters(config, kind) | sweep, chosen, torch.device(config.device), settings)
    add_comparisons([result], None)
    return result


def choose_workload(
    spec: str, names: Sequence[str], swept: Sequence[str], head_dim: int | None = None, kv_heads: int | None = None
) -> str:
    """The workload that a batch and its backends mean. None: not said."""
    other_shape = head_dim not in (None, HEAD_DIM) or kv_heads not in (None, 1)
    if other_shape or any(n in STANDARD_ONLY for n in names):
        return "standard"
    decodes = all(r.q_len == 1 for r in parse_batch_spec(spec))
    return "dense_decode" if decodes and "reorder_batch_threshold" not in swept else "mla_batch"


def parameters(config: BenchmarkConfig, workload: str) -> dict[str, Any]:
    """A configuration as parameters of a workload."""
    params: dict[str, Any] = {
        "batch_spec": config.batch_spec,
        "heads": config.num_q_heads,
        "page_size": config.block_size,
        "min_sets": config.num_layers,
    }
    if workload == "standard":
        params |= {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    return params


def benchmark_method(
    method: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    k_nope: torch.Tensor,
    k_pe: torch.Tensor,
    num_warmup: int = 10,
    num_iters: int = 100,
) -> float:
    """Median milliseconds of `method(k_nope, k_pe)`, such as a concatenation [B, H, D_nope], [B, 1, D_pe].

    num_warmup: least number of warm-up samples. num_iters: samples. The workload `concat_k` checks and compares.
    """
    call = [lambda: method(k_nope, k_pe)]
    return time_calls(call, k_nope.device, repeats=num_iters, warmup_iters=num_warmup, budget_s=60.0).median_us / 1e3
