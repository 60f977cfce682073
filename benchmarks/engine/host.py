"""What the host spends on one call of each operation, for the shapes of a served model.

    python -m benchmarks host                  # on this machine's device, kernels launched
    python -m benchmarks host --arch sm_90     # elsewhere: checks and choice alone, nothing is launched

Microseconds of the calling thread, median of rounds: `checks` builds the Call from a public function's arguments,
`choice` runs it with an implementation that does nothing, `launch` is the bare implementation, `whole` the public
function. A layer makes about ten calls, so twenty microseconds a call are a fifth of a millisecond a layer.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.engine import output
from benchmarks.report.screen import Line, console, print_table
from nsa_backend_plugin.ops import dispatch, sparse_mla
from nsa_backend_plugin.ops.arch import device_arch, pretended
from nsa_backend_plugin.ops.call import Call
from nsa_backend_plugin.ops.dispatch import Operation
from nsa_backend_plugin.runtime import served

COLUMNS = ("checks", "choice", "launch", "whole")
STEPS = {"decode": served.Step(16, 8192), "prefill": served.Step(1, 1024, 1024, prefill=True)}
CPU_STEPS = {"decode": served.Step(2, 256)}  # the references take their time


class Asked(NamedTuple):
    """A public function as the engine calls it, and the Call that it builds."""

    operation: Operation[Any, Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    call: Any


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--arch", help="architecture whose choices are made; default: this machine's device")
    made.add_argument("--model", help="default: the first; names: " + "; ".join(served.examples("sm_90")))
    made.add_argument("--calls", type=int, default=200, metavar="N", help="of each function in a round")
    made.add_argument("--rounds", type=int, default=15, metavar="N")
    output.add_arguments(made)
    return made


def main(words: Sequence[str]) -> int:
    options = parser().parse_args(words)
    device = torch.device(output.device())
    own = device_arch(device)
    arch = options.arch = options.arch or own
    models = served.examples(arch)
    model = options.model = options.model or next(iter(models))
    try:
        for name in ("calls", "rounds"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name}={getattr(options, name)}: expected at least 1")
        if model not in models:
            raise ValueError(f"--model={model!r}: expected one of {', '.join(models)}")
        path = output.prepare(options, "host", arch)
    except ValueError as error:
        print(f"benchmarks host: error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for title, step in (CPU_STEPS if arch == "cpu" else STEPS).items():
        for asked in calls_of(models[model], step, arch):
            if arch == own:
                asked = with_memory(asked, device)
            with pretended(arch):
                rows.append({"step": title, "function": asked.operation.name, **measure(asked, options, arch == own)})
    output.save(path, options, rows)
    show(rows)
    print(f"wrote {path}")
    return 0


def calls_of(model: served.Model, step: served.Step, arch: str) -> list[Asked]:
    """What the engine asks of one layer, with tensors on `meta`."""
    asked: list[Asked] = []
    operations = dict.fromkeys(operation for operation, _ in served.calls(model, step, arch))

    def listen(operation: Operation[Any, Any], build: Callable[..., Call[Any]], *args: Any, **more: Any) -> Call[Any]:
        call = build(*args, **more)
        asked.append(Asked(operation, args, more, call))
        return call

    builders = {operation: operation.call for operation in operations}
    try:
        for operation, build in builders.items():
            operation.call = functools.partial(listen, operation, build)
        for _ in served.calls(model, step, arch):
            pass
    finally:
        for operation, build in builders.items():
            operation.call = build
    return asked


def with_memory(asked: Asked, device: torch.device) -> Asked:
    """The same on a device: zeros, with the strides that each tensor had."""

    def real(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).zero_()

    args, options = tuple(map(real, asked.args)), {name: real(value) for name, value in asked.options.items()}
    if asked.operation is sparse_mla.attend:  # as promised, so many slots lead each row of the indices
        options["lengths"].fill_(asked.call.indices.shape[1])
    return asked._replace(args=args, options=options, call=asked.operation.call(*args, **options))


def measure(asked: Asked, options: argparse.Namespace, launches: bool) -> dict[str, Any]:
    """Implementation and microseconds. launches: whether the arguments have memory behind them."""
    operation, args, more, call = asked
    chosen = operation.explain(call).chosen
    assert chosen is not None, f"nothing runs {operation.name}"
    module = importlib.import_module(dispatch.module_path(operation.op, chosen))
    launch = getattr(module, operation.function)
    clock = functools.partial(microseconds, calls=options.calls, rounds=options.rounds)
    row: dict[str, Any] = {"implementation": chosen}
    try:
        setattr(module, operation.function, lambda call: None)
        dispatch.forget_plans()
        row["checks"] = clock(lambda: operation.call(*args, **more))
        row["choice"] = clock(lambda: operation.run(call))
    finally:
        setattr(module, operation.function, launch)
        dispatch.forget_plans()
    if launches:
        row["launch"] = clock(lambda: launch(call))
        row["whole"] = clock(lambda: operation(*args, **more))
    return row


def microseconds(function: Callable[[], Any], calls: int, rounds: int) -> float:
    """CPU time of the calling thread per call, median of rounds, after one round that warms up."""
    samples = []
    for _ in range(rounds + 1):
        start = time.thread_time()
        for _ in range(calls):
            function()
        samples.append((time.thread_time() - start) / calls * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is queued must not slow the next round down
    return round(statistics.median(samples[1:]), 2)


def show(rows: Sequence[dict[str, Any]]) -> None:
    groups: dict[str, list[Line]] = {}
    for row in rows:
        cells = [f"{row[column]:.1f}" if column in row else "" for column in COLUMNS]
        groups.setdefault(row["step"], []).append(Line(f"{row['function']} ({row['implementation']})", cells))
    print_table(console(), [f"{column} us" for column in COLUMNS], list(groups.items()))
