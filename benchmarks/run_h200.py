"""Run the benchmark configurations on a GPU host and write one results file each.

    python benchmarks/run_h200.py --configs ops dsa_decode --budget-seconds 280 --out results/

Every configuration is a process of its own with a time budget; rows are saved as they come, so whatever was measured
when the time ends is there. A second run over the same --out resumes what an earlier one left unfinished.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Most important first.
ORDER = (
    "ops",
    "small_heads",
    "dsa_decode",
    "dsa_indexer",
    "mla_decode",
    "kv_quant",
    "mla_concat",
    "dsa_prefill",
    "speculative_decode",
    "mla_mixed_batch",
    "reorder_threshold",
    "standard_attention",
    "cutlass_mla",
)
INCOMPLETE = 75


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=ORDER, default=list(ORDER), metavar="CONFIG")
    parser.add_argument("--budget-seconds", type=float, default=300.0, help="for each configuration")
    parser.add_argument("--total-seconds", type=float, help="for all of them together")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--suffix", default="h200", help="results are named CONFIG-SUFFIX.json")
    parser.add_argument("--quick", action="store_true", help="the small sizes, to try the machinery")
    parser.add_argument("--device", help="default: cuda:0, or cpu without a GPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    codes = {}
    for name in options.configs:
        budget = options.budget_seconds
        if options.total_seconds is not None:
            budget = min(budget, options.total_seconds - (time.monotonic() - started))
        if budget < 10:
            print(f"== {name}: not started, the time is used up", flush=True)
            codes[name] = INCOMPLETE
            continue
        codes[name] = run_config(name, budget, options)
        took = time.monotonic() - started
        print(f"== {name}: exit code {codes[name]} after {took:.0f} s in all", flush=True)
    for name, code in codes.items():
        verdict = {0: "complete", 1: "complete, some rows failed", INCOMPLETE: "incomplete"}.get(code, "failed")
        print(f"{name}: {verdict}")
    return max(codes.values(), default=0)


def run_config(name: str, budget: float, options: argparse.Namespace) -> int:
    """One configuration in its own process; its exit code."""
    command = [
        sys.executable,
        str(HERE / "benchmark.py"),
        "--config",
        str(HERE / "configs" / f"{name}.yaml"),
        "--output-json",
        str(options.out / f"{name}-{options.suffix}.json"),
        "--budget-seconds",
        str(int(budget)),
    ]
    command += ["--quick"] if options.quick else []
    command += ["--device", options.device] if options.device else []
    try:
        return subprocess.run(command, check=False, timeout=budget + 60).returncode
    except subprocess.TimeoutExpired:
        return 124


if __name__ == "__main__":
    sys.exit(main())
