"""Run the benchmark configurations on a GPU host in one go and write one results file each.

    python -m benchmarks.run.suite --total-seconds 560 --out benchmarks/results
    python -m benchmarks.run.suite --configs ops dsa_decode --total-seconds 120

First everything is compiled, in several processes side by side; then one process measures, configuration after
configuration. Rows are saved as they come, so whatever was measured when the time ends is there. A second run over the
same --out measures only what is missing: complete files of the same device, libraries and sources are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cli as benchmark
from benchmarks.run import environment

HERE = Path(__file__).resolve().parents[1]
#: Most important first: what a short budget cuts is the end.
ORDER = (
    "ops",
    "small_heads",
    "dsa_decode",
    "dsa_indexer",
    "mla_decode",
    "mla_concat",
    "kv_quant",
    "standard_attention",
    "dsa_prefill",
    "speculative_decode",
    "mla_mixed_batch",
    "reorder_threshold",
    "cutlass_mla",
)
INCOMPLETE = 75
#: A configuration may use this many times its equal share of the time that is left.
SHARES = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", choices=ORDER, default=list(ORDER), metavar="CONFIG")
    parser.add_argument("--total-seconds", type=float, default=1800.0, help="for everything; default 1800")
    parser.add_argument("--compile-seconds", type=float, default=90.0, help="at most, of the total; 0: no compilation")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--suffix", default="h200", help="results are named CONFIG-SUFFIX.json")
    parser.add_argument("--quick", action="store_true", help="the small sizes, to try the machinery")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--device", help="default: cuda:0, or cpu without a GPU")
    options = parser.parse_args(argv)
    options.device = benchmark.default_device(options)
    options.quick |= options.device == "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    ends = started + options.total_seconds
    wanted = [name for name in options.configs if options.fresh or not is_complete(name, options)]
    if options.compile_seconds > 0 and wanted:
        compile_first(wanted, options)

    from benchmarks.run.child import Child

    codes = {name: 0 for name in options.configs if name not in wanted}
    with Child() as child:
        for position, name in enumerate(wanted):
            left = ends - time.monotonic()
            if left < 5:
                codes[name] = INCOMPLETE
                continue
            budget = left * min(1.0, SHARES / (len(wanted) - position))
            codes[name] = run_config(name, budget, options, child)
            print(f"== {name}: exit code {codes[name]} after {time.monotonic() - started:.0f} s in all", flush=True)
    for name in options.configs:
        verdict = {0: "complete", 1: "complete, some rows failed", INCOMPLETE: "incomplete"}.get(codes[name], "failed")
        print(f"{name}: {verdict}{'' if name in wanted else ' before'}")
    return max(codes.values(), default=0)


def output(name: str, options: argparse.Namespace) -> Path:
    return options.out / f"{name}-{options.suffix}.json"


def is_complete(name: str, options: argparse.Namespace) -> bool:
    """Whether an earlier run finished this configuration, as it is now, on the same device, libraries and sources."""
    from benchmarks import schema as configs
    from benchmarks.common import load_json

    path = output(name, options)
    if not path.exists():
        return False
    (formatter, results), here = load_json(path), environment.collect(options.device)
    same = all(formatter.environment.get(k) == here[k] for k in environment.IDENTITY)
    config = configs.load(HERE / "configs" / f"{name}.yaml", options.quick)
    return formatter.complete and same and not configs.unmeasured(config, results)


def compile_first(names: list[str], options: argparse.Namespace) -> None:
    from benchmarks import schema as configs
    from benchmarks.run import prepare, sweep

    rows = [
        row
        for name in names
        for row in sweep.plan(configs.load(HERE / "configs" / f"{name}.yaml", options.quick), options.device)
    ]
    print(f"== {prepare.compile_all(rows, options.device, options.jobs, options.compile_seconds)}", flush=True)


def run_config(name: str, budget: float, options: argparse.Namespace, child) -> int:
    """One configuration; its exit code."""
    words = ["--config", str(HERE / "configs" / f"{name}.yaml"), "--output-json", str(output(name, options))]
    words += ["--budget-seconds", f"{budget:.0f}", "--device", options.device]
    words += ["--quick"] if options.quick else []
    words += ["--fresh"] if options.fresh else []
    try:
        return benchmark.run(benchmark.build_parser().parse_args(words), child)
    except Exception:  # the next configuration shall still have its turn
        traceback.print_exc()
        return 70


if __name__ == "__main__":
    sys.exit(main())
