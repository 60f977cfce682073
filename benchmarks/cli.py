"""Benchmark every implementation of every DSA and MLA operation, checked first, timed side by side.

    python -m benchmarks --config benchmarks/configs/mla_decode.yaml
    python -m benchmarks --backends flash_mla triton --batch-specs 64q1s1k 64q1s4k --output-csv out.csv
    python -m benchmarks compare before.json after.json

`nsa-plugin bench` is the same command. A run that was killed resumes: every finished row was kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.common import BenchmarkResult, ResultsFormatter
    from benchmarks.run.child import Child
    from benchmarks.schema import Config

#: Where a run without output files keeps its finished rows until it is complete.
JOURNALS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nsa-backend-plugin" / "benchmarks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("compare", nargs="*", metavar="compare A.json B.json", help="compare two results files")
    parser.add_argument("--config", type=Path, help="YAML file; overrides the arguments that say what to measure")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the config's small sizes: what a CPU gets without --full")
    size.add_argument("--full", action="store_true", help="the config's own sizes, on a CPU too")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--backends", nargs="+", metavar="BACKEND", help="names, or all")
    what.add_argument("--backend", help="a single backend")
    what.add_argument("--batch-specs", nargs="+", metavar="SPEC", help="such as q2k 8q1s1k 2q2k_32q1s1k")
    what.add_argument("--workload", help="default: from backends, head dim and batch")
    what.add_argument("--num-layers", type=int, help="layers walked through in turn; times are per layer")
    what.add_argument("--head-dim", type=int, help="576 is MLA")
    what.add_argument("--num-q-heads", type=int)
    what.add_argument("--num-kv-heads", type=int)
    what.add_argument("--block-size", type=int, help="tokens per page")
    what.add_argument("--sweep-param", help="such as num_kv_splits, reorder_batch_threshold")
    what.add_argument("--sweep-values", nargs="+", type=int, metavar="N")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--device", help="default: cuda:0, or cpu without a GPU")
    how.add_argument("--repeats", type=int, help="samples per row (median is reported)")
    how.add_argument("--warmup-iters", type=int, help="least warm-up samples; more follow until stable")
    how.add_argument("--profile-memory", action="store_true", help="peak memory of one call")
    how.add_argument("--budget-seconds", type=float, help="start no further row after this long")
    how.add_argument("--isolate", choices=("auto", "yes", "no"), default="auto", help="child processes; auto: on a GPU")
    how.add_argument("--fresh", action="store_true", help="forget the finished rows of an interrupted run")
    output = parser.add_argument_group("output")
    output.add_argument("--output-csv", type=Path)
    output.add_argument("--output-json", type=Path)
    output.add_argument("--plot", type=Path, help="PNG: roofline, and time over batch per backend")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m benchmarks"
    )
    add_arguments(parser)
    return parser


def configuration(options: argparse.Namespace) -> Config:
    """The configuration that the options ask for. Raises ValueError for a bad one."""
    from benchmarks import schema as configs

    if options.config is not None:
        quick = options.quick or (not options.full and default_device(options) == "cpu")
        if quick and not options.quick:
            print("on a CPU: the small sizes of this configuration (--full for its own)")
        config = configs.load(options.config, quick)
        for name in ("repeats", "warmup_iters"):
            if getattr(options, name) is not None:
                setattr(config, name, getattr(options, name))
        if options.backends or options.backend:
            chosen = tuple(options.backends or [options.backend])
            config.cases = [dataclasses.replace(case, backends=chosen) for case in config.cases]
        return config
    from benchmarks import mla_runner

    return mla_runner.config_from_options(options)


def run(options: argparse.Namespace, child: Child | None = None) -> int:
    """Exit code: 0, 1 when a row failed, 2 for bad arguments, 75 when the budget ended before the last row.

    child: a measuring process to use and leave running; None starts one where the options ask for it.
    """
    if options.compare:
        return _compare(options.compare)
    if not _has_gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        print("benchmarks: error: --plot needs matplotlib (pip install 'nsa-backend-plugin[bench]')", file=sys.stderr)
        return 2
    device = default_device(options)
    try:
        config = configuration(options)
        with ExitStack() as stack:
            if child is None and _isolates(options, device):
                from benchmarks.run.child import Child

                child = stack.enter_context(Child())
            results, complete = _run_config(config, device, options, child)
    except (ValueError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    if not complete:
        return 75
    return 1 if any(r.status == "error" for r in results) else 0


def _isolates(options: argparse.Namespace, device: str) -> bool:
    return options.isolate == "yes" or (options.isolate == "auto" and device.startswith("cuda"))


def _run_config(
    config: Config, device: str, options: argparse.Namespace, child: Child | None
) -> tuple[list[BenchmarkResult], bool]:
    from benchmarks.common import ResultsFormatter, add_comparisons
    from benchmarks.report.screen import Screen
    from benchmarks.run import environment, sweep
    from benchmarks.run.measure import Settings

    env = environment.collect(device)
    settings = Settings(config.repeats, config.warmup_iters, config.budget_s, options.profile_memory)
    rows = sweep.plan(config, device)
    journal_path = _journal_path(config, options)
    if options.fresh:
        journal_path.unlink(missing_ok=True)
    journal = sweep.Journal.open(journal_path, sweep.fingerprint(settings, env))
    formatter = ResultsFormatter(
        environment=env, config=config.name, baseline=config.baseline, memory=options.profile_memory
    )
    if options.profile_memory and not device.startswith("cuda"):
        print(f"--profile-memory: peak memory is known of GPUs only, not of {device}")
    if journal.others:
        print(f"{journal.others} rows in {journal_path} are of other settings, libraries or sources: measured again")
    deadline = None if options.budget_seconds is None else time.monotonic() + options.budget_seconds
    saved = time.monotonic()
    so_far: list[BenchmarkResult] = []

    with Screen(config, env, len(rows), sum(journal.finished(r) is not None for r in rows)) as screen:

        def on_row(result: BenchmarkResult, done: int, total: int) -> None:
            nonlocal saved
            so_far.append(result)
            add_comparisons([result], journal.ceilings.get("read_gbps"))
            screen.row(formatter.cells(result), done, total)
            if options.output_json and time.monotonic() - saved > 10:
                saved = time.monotonic()
                formatter.ceilings = journal.ceilings
                formatter.save_json([r for r in journal.rows.values()], options.output_json)

        results, complete = sweep.run(rows, device, settings, journal, child=child, deadline=deadline, on_row=on_row)
    formatter.ceilings, formatter.complete = journal.ceilings, complete
    add_comparisons(results, journal.ceilings.get("read_gbps"))
    screen.table(formatter, results)
    if config.mode == "decode_vs_prefill":
        from benchmarks.report.crossover import report

        print(report(results))
    _save(formatter, results, options)
    if complete:
        journal.discard()
    else:
        print(f"{len(results)} of {len(rows)} rows; run the same command again for the rest")
    return results, complete


def _save(formatter: ResultsFormatter, results: list[BenchmarkResult], options: argparse.Namespace) -> None:
    if options.output_csv:
        formatter.save_csv(results, options.output_csv)
    if options.output_json:
        formatter.save_json(results, options.output_json)
    if options.plot:
        from benchmarks.report.plot import save_plot

        save_plot(formatter, results, options.plot)


def _journal_path(config: Config, options: argparse.Namespace) -> Path:
    output = options.output_json or options.output_csv
    if output is not None:
        return output.with_name(output.name + ".rows.jsonl")
    return JOURNALS / f"{config.name}{'-quick' if options.quick else ''}.rows.jsonl"


def default_device(options: argparse.Namespace) -> str:
    return options.device or ("cuda:0" if _has_gpu() else "cpu")


def _has_gpu() -> bool:
    """Whether torch sees a GPU, asked without starting CUDA in this process."""
    import torch

    return bool(torch.version.cuda or torch.version.hip) and torch.cuda.device_count() > 0


def _compare(words: list[str]) -> int:
    from benchmarks.report.compare import compare_files

    if words[0] != "compare" or len(words) != 3:
        print(f"benchmarks: error: {' '.join(words)!r}: expected compare A.json B.json", file=sys.stderr)
        return 2
    try:
        return compare_files(Path(words[1]), Path(words[2]))
    except (OSError, ValueError, KeyError) as error:
        print(f"benchmarks: error: not a results file: {error}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    return run(build_parser().parse_args(argv))
