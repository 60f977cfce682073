"""Run every configuration in one go and write one results file each, CONFIG-MACHINE.json.

    python -m benchmarks suite --total-seconds 560 --out benchmarks/results
    python -m benchmarks suite --configs ops dsa_decode --total-seconds 120

First everything is compiled, in several processes side by side; then one process measures, configuration after
configuration. Rows are kept as they come, and what was measured when the time ends is written. A second run over the
same --out measures only what is missing: complete files of the same device, libraries and sources are kept; other
complete files are replaced with --force only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cli, schema
from benchmarks.common import load_json
from benchmarks.run import environment, prepare, sweep
from benchmarks.run.child import Child

HERE = Path(__file__).resolve().parents[1]
#: Most important first: what a short budget cuts is the end.
ORDER = (
    "ops",
    "small_heads",
    "dsa_decode",
    "projection",
    "fp8_rows",
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
#: A configuration may use this many times its equal share of the time that is left.
SHARES = 2.0


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", choices=ORDER, default=list(ORDER), metavar="CONFIG")
    parser.add_argument("--total-seconds", type=float, default=1800.0, help="for everything; default 1800")
    parser.add_argument("--compile-seconds", type=float, default=90.0, help="at most, of the total; 0: no compilation")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="the small sizes, to try the machinery")
    parser.add_argument("--force", action="store_true", help="replace complete files of other sources or libraries")
    parser.add_argument("--fresh", action="store_true", help="with --force: measure everything again")
    parser.add_argument("--device", help="default: cuda:0, or cpu without a GPU")
    options = parser.parse_args(words)
    options.device = cli.default_device(options)
    options.quick |= options.device == "cpu"
    try:
        schema.check_device(options.device)
        options.out.mkdir(parents=True, exist_ok=True)
        wanted = [name for name in options.configs if options.fresh or not is_complete(name, options)]
        in_the_way = [output(name, options) for name in wanted if output(name, options).exists() and not options.force]
        for path in in_the_way:
            if load_json(path)[0].complete:
                raise ValueError(f"{path}: exists, of other sources, libraries or cases; --force replaces it")
    except (ValueError, OSError) as error:
        print(f"benchmarks suite: error: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    ends = started + options.total_seconds
    if options.compile_seconds > 0 and wanted:
        compile_first(wanted, options)
    codes = {name: 0 for name in options.configs if name not in wanted}
    with Child() as child:
        for position, name in enumerate(wanted):
            left = ends - time.monotonic()
            if left < 5:
                codes[name] = cli.INCOMPLETE
                continue
            budget = left * min(1.0, SHARES / (len(wanted) - position))
            codes[name] = run_config(name, budget, options, child)
            print(f"== {name}: exit code {codes[name]} after {time.monotonic() - started:.0f} s in all", flush=True)
    known = {0: "complete", 1: "complete, some rows failed", cli.INCOMPLETE: "incomplete"}
    for name in options.configs:
        print(f"{name}: {known.get(codes[name], 'failed')}{'' if name in wanted else ' before'}")
    return max(codes.values(), default=0)


def output(name: str, options: argparse.Namespace) -> Path:
    return options.out / f"{name}-{environment.machine(options.device)}.json"


def load(name: str, options: argparse.Namespace) -> schema.Config:
    return schema.load(HERE / "configs" / f"{name}.yaml", options.quick)


def is_complete(name: str, options: argparse.Namespace) -> bool:
    """Whether an earlier run finished this configuration, as it is now, on the same device, libraries and sources."""
    path = output(name, options)
    if not path.exists():
        return False
    (formatter, results), here = load_json(path), environment.collect(options.device)
    same = all(formatter.environment.get(k) == here[k] for k in environment.IDENTITY)
    return formatter.complete and same and not schema.unmeasured(load(name, options), results)


def compile_first(names: list[str], options: argparse.Namespace) -> None:
    rows = [row for name in names for row in sweep.plan(load(name, options), options.device)]
    print(f"== {prepare.compile_all(rows, options.device, options.jobs, options.compile_seconds)}", flush=True)


def run_config(name: str, budget: float, options: argparse.Namespace, child: Child) -> int:
    """One configuration; its exit code."""
    path = output(name, options)
    words = ["--config", str(HERE / "configs" / f"{name}.yaml"), "--output-json", str(path)]
    words += ["--budget-seconds", f"{budget:.0f}", "--device", options.device]
    words += ["--quick"] if options.quick else []
    words += ["--fresh"] if options.fresh else []
    words += ["--force"] if path.exists() else []  # incomplete, or allowed by --force
    try:
        return cli.run(cli.build_parser().parse_args(words), child)
    except Exception:  # the next configuration shall still have its turn
        traceback.print_exc()
        return 70
