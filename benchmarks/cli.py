"""Benchmark every implementation of every DSA and MLA operation, checked first, timed side by side.

    python -m benchmarks --config benchmarks/configs/mla_decode.yaml
    python -m benchmarks --backends flash_mla triton --batch-specs 64q1s1k 64q1s4k --output-csv out.csv
    python -m benchmarks --workload topk --param rows=1,64 --param k=2048

A run that was killed resumes: every finished row was kept. Other commands, each with its own --help:

    compare A.json B.json    two results files, row by row
    suite                    every configuration, for a GPU host
    report                   RESULTS.md from the results files
    layers, served, serving  the engine beside stock SGLang: one layer's kernels, decode steps, load
    grid                     decode steps and first tokens beside stock, in process, over batches, contexts and heads
    host                     what the host spends on a call: checks, choice, launch
    engine                   every test and measurement of the engine, for a GPU host
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.common import BenchmarkResult
    from benchmarks.run.child import Child
    from benchmarks.schema import Config

HERE = Path(__file__).resolve().parent
#: Where a run without output files keeps its finished rows until it is complete.
JOURNALS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nsa-backend-plugin" / "benchmarks"
#: Name -> module with main(words) -> exit code; the last three share one.
COMMANDS = {
    "compare": "benchmarks.report.compare",
    "suite": "benchmarks.run.suite",
    "report": "benchmarks.report.page",
    "engine": "benchmarks.engine.steps",
    "serving": "benchmarks.engine.serving",
    "host": "benchmarks.engine.host",
    "grid": "benchmarks.engine.grid",
    "layers": "benchmarks.engine.measure",
    "served": "benchmarks.engine.measure",
}
NEEDED = ("torch", "pydantic", "yaml", "rich")
INCOMPLETE = 75


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="with --workload: its parameters too")
    parser.add_argument("--config", type=Path, help="YAML file that says what to measure")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the config's small sizes: what a CPU gets without --full")
    size.add_argument("--full", action="store_true", help="the config's own sizes, on a CPU too")
    backends = parser.add_mutually_exclusive_group()
    backends.add_argument("--backends", nargs="+", metavar="BACKEND", help="names, or all; default: all or the file's")
    backends.add_argument("--backend", help="a single backend")
    what = parser.add_argument_group("what to measure, without --config")
    what.add_argument("--batch-specs", nargs="+", metavar="SPEC", help="such as q2k 8q1s1k 2q2k_32q1s1k")
    what.add_argument("--workload", help="default: from backends, head dim and batch")
    what.add_argument(
        "--param", action="append", metavar="NAME=VALUE[,VALUE...]", help="a parameter of the workload, repeatable"
    )
    what.add_argument("--num-layers", type=int, metavar="N", help="layers walked through in turn; times are per layer")
    what.add_argument("--head-dim", type=int, metavar="N", help="576 is MLA")
    what.add_argument("--num-q-heads", type=int, metavar="N")
    what.add_argument("--num-kv-heads", type=int, metavar="N")
    what.add_argument("--block-size", type=int, metavar="N", help="tokens per page")
    what.add_argument("--sweep-param", metavar="PARAM", help="such as num_kv_splits, reorder_batch_threshold")
    what.add_argument("--sweep-values", nargs="+", type=int, metavar="N")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--device", help="default: cuda:0, or cpu without a GPU")
    how.add_argument("--repeats", type=int, metavar="N", help="samples per row (median is reported)")
    how.add_argument("--warmup-iters", type=int, metavar="N", help="least warm-up samples; more follow until stable")
    how.add_argument("--profile-memory", action="store_true", default=None, help="peak memory of one call")
    how.add_argument("--budget-seconds", type=float, metavar="S", help="start no further row after this long")
    how.add_argument("--isolate", choices=("auto", "yes", "no"), default="auto", help="child processes; auto: on a GPU")
    how.add_argument("--fresh", action="store_true", help="forget the finished rows of an interrupted run")
    output = parser.add_argument_group("output")
    output.add_argument("--output-csv", type=Path, metavar="FILE")
    output.add_argument("--output-json", type=Path, metavar="FILE")
    output.add_argument("--plot", type=Path, metavar="FILE", help="PNG that answers the configuration's question")
    output.add_argument("--force", action="store_true", help="replace output files that exist")
    return parser


#: Options that say what to measure, and the workload parameters that some of them are.
WHAT = ("batch_specs", "workload", "param", "sweep_param", "sweep_values")
PARAMETERS = {
    "num_q_heads": "heads",
    "num_kv_heads": "kv_heads",
    "head_dim": "head_dim",
    "block_size": "page_size",
    "num_layers": "min_sets",
}


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def configuration(options: argparse.Namespace) -> Config:
    """The configuration that the options ask for. Raises ValueError for a bad one."""
    from benchmarks import schema

    given = {name: value for name, value in vars(options).items() if value is not None}
    how = {name: given[name] for name in schema.Settings.model_fields if name in given}
    backends = options.backends or ([options.backend] if options.backend else None)
    names = {name: option(name) for name in given}
    if options.config is None:
        return schema.from_mapping({**_asked_for(options), "backends": backends or ["all"], **how}, names=names)
    refused = [option(name) for name in (*WHAT, *PARAMETERS) if name in given]
    if refused:
        raise ValueError(f"{refused[0]}: not with --config, whose file says what to measure")
    quick = options.quick or (not options.full and default_device(options) == "cpu")
    if quick and not options.quick:
        print("on a CPU: the small sizes of this configuration (--full for its own)")
    config = schema.load(find_config(options.config), quick)
    config.settings = schema.check(schema.Settings, {**config.settings.model_dump(), **how}, names)
    if backends:
        config.cases = [dataclasses.replace(case, backends=tuple(backends)) for case in config.cases]
    return config


def find_config(path: Path) -> Path:
    """The file as named, or of that name among the suite's own configurations."""
    candidates = (path, HERE / path, HERE / "configs" / path.with_suffix(".yaml").name)
    found = next((p for p in candidates if p.is_file()), None)
    if found is None:
        own = ", ".join(sorted(p.stem for p in (HERE / "configs").glob("*.yaml")))
        raise ValueError(f"--config={path}: no such file; expected a YAML file, or one of {own}")
    return found


def _asked_for(options: argparse.Namespace) -> dict[str, Any]:
    """The content of a YAML file for options without --config."""
    from benchmarks.mla_runner import choose_workload

    if not options.batch_specs and not options.workload:
        raise ValueError("--batch-specs or --workload is missing (or give --config)")
    if (options.sweep_param is None) != (options.sweep_values is None):
        raise ValueError("--sweep-param and --sweep-values go together")
    params = dict(_param(text) for text in options.param or ())
    if options.sweep_param in params:
        raise ValueError(f"--sweep-param={options.sweep_param}: --param gives it a value too")
    params |= {options.sweep_param: options.sweep_values} if options.sweep_param else {}
    names = options.backends or [options.backend or "all"]
    runs = []
    for spec in options.batch_specs or [None]:
        kind = options.workload or choose_workload(
            spec, names, tuple(params), options.head_dim, options.num_kv_heads or params.get("kv_heads")
        )
        given = _known_to(kind, options, params, spec)
        runs.append({"workload": kind, "params": given} | ({"batch_specs": [spec]} if spec else {}))
    return {"runs": runs, "plot": {"x": options.sweep_param}}


def _known_to(kind: str, options: argparse.Namespace, params: Mapping[str, Any], spec: str | None) -> dict[str, Any]:
    """The parameters that the options give a workload. Raises ValueError for an option that it has no use for."""
    from benchmarks.checked import check
    from benchmarks.mla_runner import MLA
    from benchmarks.workloads import workload

    known = workload(kind).params.model_fields
    if spec and "batch_spec" not in known:
        raise ValueError(f"--batch-specs: workload {kind} has no batch; its --param are {', '.join(known)}")
    given = dict(params)
    names = {}
    for name, parameter in PARAMETERS.items():
        value = getattr(options, name)
        if value is None or (parameter not in known and MLA.get(parameter) == value):
            continue
        if parameter not in known:
            raise ValueError(f"{option(name)}={value}: workload {kind} has no {parameter}")
        if parameter in params:
            raise ValueError(f"{option(name)}={value}: --param gives {parameter} a value too")
        given[parameter], names[parameter] = value, option(name)
    check(workload(kind).params, {parameter: given[parameter] for parameter in names}, names)
    return given


def _param(text: str) -> tuple[str, Any]:
    """NAME=VALUE[,VALUE...]; numbers, true, false and null are what JSON says they are, anything else is text."""
    name, _, values = text.partition("=")
    if not name or not values:
        raise ValueError(f"--param {text!r}: expected NAME=VALUE or NAME=VALUE,VALUE")
    found = []
    for value in values.split(","):
        try:
            found.append(json.loads(value))
        except json.JSONDecodeError:
            found.append(value)
    return name, found if len(found) > 1 else found[0]


def run(options: argparse.Namespace, child: Child | None = None) -> int:
    """Exit code: 0, 1 when a row failed or none has a time, 2 for bad arguments, 75 when the budget ended before the
    last row.

    child: a measuring process to use and leave running; None starts one where the options ask for it.
    """
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        return _error("--plot needs matplotlib (python -m pip install 'nsa-backend-plugin[bench]')")
    try:
        from benchmarks.schema import check_device

        device = default_device(options)
        check_device(device)
        if options.budget_seconds is not None and not options.budget_seconds > 0:
            raise ValueError(f"--budget-seconds={options.budget_seconds}: expected more than 0")
        config = configuration(options)
        journal = _journal_path(config, options)
        _check_outputs(options, journal)
        with ExitStack() as stack:
            stack.enter_context(_alone(journal))
            if child is None and _isolates(options, device):
                from benchmarks.run.child import Child

                child = stack.enter_context(Child())
            results, complete = _run_config(config, device, options, child, journal)
    except (ValueError, OSError) as error:
        return _error(str(error))
    if not any(r.median_us is not None for r in results):
        print("benchmarks: nothing was measured", file=sys.stderr)
        return 1 if complete else INCOMPLETE
    if not complete:
        return INCOMPLETE
    return 1 if any(r.status == "error" for r in results) else 0


def _error(text: str) -> int:
    print(f"benchmarks: error: {text}", file=sys.stderr)
    return 2


def _isolates(options: argparse.Namespace, device: str) -> bool:
    return options.isolate == "yes" or (options.isolate == "auto" and device.startswith("cuda"))


def _outputs(options: argparse.Namespace) -> dict[str, Path]:
    names = ("output_json", "output_csv", "plot")
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _check_outputs(options: argparse.Namespace, journal: Path) -> None:
    """Raise ValueError for outputs that could not be written in the end. What an interrupted run wrote may be
    replaced by the run that resumes it."""
    seen: dict[Path, str] = {}
    for name, path in _outputs(options).items():
        if path.resolve() in seen:
            raise ValueError(f"{option(name)}={path}: {seen[path.resolve()]} is the same file")
        seen[path.resolve()] = option(name)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"{option(name)}={path}: expected a file in a folder that exists")
        if path.exists() and not options.force and not journal.exists():
            raise ValueError(f"{option(name)}={path}: exists; --force replaces it")


@contextmanager
def _alone(journal: Path):
    """Holds the run's journal against a second run with the same output."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{journal}: another run is writing it") from None
        try:
            yield
        finally:
            if journal.exists() and not journal.stat().st_size:
                journal.unlink()


def _run_config(
    config: Config, device: str, options: argparse.Namespace, child: Child | None, journal_path: Path
) -> tuple[list[BenchmarkResult], bool]:
    from benchmarks.common import ResultsFormatter, add_comparisons
    from benchmarks.report.screen import Screen
    from benchmarks.run import environment, sweep

    env = environment.collect(device)
    rows = sweep.plan(config, device)
    resuming = journal_path.stat().st_size > 0
    if options.fresh:
        journal_path.write_text("")
    journal = sweep.Journal.open(journal_path, sweep.fingerprint(config.settings, env))
    formatter = ResultsFormatter(environment=env, config=config.name, baseline=config.baseline)
    if config.settings.profile_memory and not device.startswith("cuda"):
        print(f"--profile-memory: peak memory is known of GPUs only, not of {device}")
    if journal.others:
        print(f"{journal.others} rows in {journal_path} are of other settings, libraries or sources: measured again")
    deadline = None if options.budget_seconds is None else time.monotonic() + options.budget_seconds
    with Screen(config, env, len(rows), sum(journal.finished(r) is not None for r in rows)) as screen:

        def on_row(result: BenchmarkResult, done: int, total: int) -> None:
            add_comparisons([result], journal.ceilings.get("read_gbps"))
            screen.row(result, done, total)

        results, complete = sweep.run(
            rows, device, config.settings, journal, child=child, deadline=deadline, on_row=on_row
        )
    formatter.ceilings, formatter.complete = journal.ceilings, complete
    add_comparisons(results, journal.ceilings.get("read_gbps"), config.baseline)
    screen.table(formatter, results)
    if config.mode == "decode_vs_prefill":
        from benchmarks.report.crossover import report

        print(report(results))
    force = options.force or resuming
    if options.output_csv:
        formatter.save_csv(results, options.output_csv, force)
    if options.output_json:
        formatter.save_json(results, options.output_json, force)
    if options.plot:
        from benchmarks.report.plot import save_plot

        save_plot(formatter, results, options.plot, config.plot, config.unit, force)
    if complete:
        journal.discard()
    else:
        print(f"{len(results)} of {len(rows)} rows; run the same command again for the rest")
    return results, complete


def _journal_path(config: Config, options: argparse.Namespace) -> Path:
    for output in _outputs(options).values():
        return output.with_name(output.name + ".rows.jsonl")
    digest = hashlib.sha256(repr(config).encode()).hexdigest()[:12]
    return JOURNALS / f"{config.name}-{digest}.rows.jsonl"


def default_device(options: argparse.Namespace) -> str:
    return options.device or ("cuda:0" if _has_gpu() else "cpu")


def _has_gpu() -> bool:
    """Whether torch sees a GPU, asked without starting CUDA in this process."""
    import torch

    return bool(torch.version.cuda or torch.version.hip) and torch.cuda.device_count() > 0


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    missing = [name for name in (*NEEDED, "nsa_backend_plugin") if importlib.util.find_spec(name) is None]
    if missing:
        return _error(f"{', '.join(missing)} not found: in the clone, {sys.executable} -m pip install -e '.[bench]'")
    if not _has_gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated
    if words and words[0] in COMMANDS:
        shared = words[0] in ("layers", "served")
        return importlib.import_module(COMMANDS[words[0]]).main(words if shared else words[1:])
    parser = build_parser()
    options = parser.parse_args(words)
    return _help(parser, options.workload) if options.help else run(options)


def _help(parser: argparse.ArgumentParser, name: str | None) -> int:
    from benchmarks.workloads import WORKLOADS, workload

    try:
        shown = [workload(name)] if name else []
    except ValueError as error:
        return _error(f"--{error}")
    print(parser.format_help() if not shown else "", end="")
    for kind in shown:
        from benchmarks import backends

        print(f"--workload {kind.name}: {' + '.join(kind.operations) or 'ordinary attention'}")
        print(f"backends: {', '.join(backends.names(kind.name))}\n\n--param NAME=VALUE[,VALUE...]")
        for parameter, field in kind.params.model_fields.items():
            print(f"  {parameter + '=' + json.dumps(field.default).strip(chr(34)):28} {field.description}")
    if not shown:
        print(f"\nworkloads (--workload NAME --help lists parameters): {', '.join(WORKLOADS)}")
    return 0
