"""The Python API, and configurations made from command-line options.

from benchmarks.common import BenchmarkConfig
from benchmarks.mla_runner import run_mla_benchmark

config = BenchmarkConfig(backend="flash_mla", batch_spec="64q1s4k", num_q_heads=128)
result = run_mla_benchmark("flash_mla", config, num_kv_splits=4)
print(f"{result.mean_time:.6f} s")
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from benchmarks import backends
from benchmarks import schema as configs
from benchmarks.batch_spec import parse_batch_spec
from benchmarks.common import BenchmarkConfig, BenchmarkResult, add_comparisons
from benchmarks.run.measure import Settings, measure

MLA_HEAD_DIM = 576
#: Backends of ordinary attention that have no MLA meaning.
STANDARD_ONLY = ("flash", "flashinfer")


def run_mla_benchmark(backend: str, config: BenchmarkConfig, **sweep: Any) -> BenchmarkResult:
    """Measure one backend on one batch in this process.

    sweep: parameters of the workload, such as num_kv_splits or reorder_batch_threshold.
    A batch of decodes times the decode kernel alone; any other batch, or a reorder_batch_threshold, times a whole
    attention layer with its projections (workloads/mla_batch.py). Raises ValueError for a bad spec or parameter;
    a backend that fails or cannot run gives a result whose `status` and `reason` say so.
    """
    workload = choose_workload(config, (backend,), tuple(sweep))
    params = parameters(config, workload) | sweep
    device = torch.device(config.device)
    settings = Settings(config.repeats, config.warmup_iters, profile_memory=config.profile_memory)
    chosen = backends.choose([backend], workload, config.device)[0]
    result = measure(workload, params, chosen, device, settings)
    add_comparisons([result], None)
    return result


def choose_workload(config: BenchmarkConfig, names: tuple[str, ...], swept: tuple[str, ...]) -> str:
    """The workload that a batch and its backends mean."""
    if config.num_kv_heads > 1 or config.head_dim != MLA_HEAD_DIM or any(n in STANDARD_ONLY for n in names):
        return "standard"
    decodes = all(r.q_len == 1 for r in parse_batch_spec(config.batch_spec))
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


def config_from_options(options: argparse.Namespace) -> configs.Config:
    """A configuration from the command line. Raises ValueError for what is missing or contradictory."""
    names = tuple(options.backends or ([options.backend] if options.backend else ()))
    if not options.batch_specs:
        raise ValueError("--batch-specs is missing (or give --config)")
    if (options.sweep_param is None) != (options.sweep_values is None):
        raise ValueError("--sweep-param and --sweep-values go together")
    if any(n in STANDARD_ONLY for n in names):
        defaults = {"head_dim": 128, "num_q_heads": 32, "num_kv_heads": 8, "block_size": 16}
    else:
        defaults = {"head_dim": MLA_HEAD_DIM, "num_q_heads": 128, "num_kv_heads": 1, "block_size": 64}
    given: dict[str, Any] = {
        name: getattr(options, name) if getattr(options, name) is not None else default
        for name, default in {**defaults, "num_layers": 2}.items()
    }
    base = BenchmarkConfig(backend=names[0] if names else "all", batch_spec=options.batch_specs[0], **given)
    swept = {} if options.sweep_param is None else {options.sweep_param: list(options.sweep_values)}
    runs = []
    for spec in options.batch_specs:
        one = replace(base, batch_spec=spec)
        workload = options.workload or choose_workload(one, names, tuple(swept))
        runs.append({"workload": workload, "params": parameters(one, workload) | swept})
    content: dict[str, Any] = {"name": "custom", "runs": runs, "backends": list(names or ("all",))}
    content |= {k: getattr(options, k) for k in ("repeats", "warmup_iters") if getattr(options, k) is not None}
    return configs.from_mapping(content)
