"""Decode steps, the ordered kernels of one layer and first tokens, backends side by side.

Each arm is an attention backend with variables and arguments of its own, run in a process of its own on the same model,
shapes and cache contents. Printed per arm and shape: decode step, attention span and launches of one layer, and every
kernel with its stream and time; per arm and prompt: milliseconds to the first token, and the kernels by their time.

    nsa-plugin profile --arms nsa_plugin dsa --shapes 1:8192 64:8192 --json layers.json -- --model-path M ...
    nsa-plugin profile --arms nsa_plugin "nsa_plugin NSA_PLUGIN_DUAL_STREAM=0" -- --model-path M ...
    nsa-plugin profile --together --no-kernels --prompts 1024 8192 -- --model-path SMALL ...

One arm after the other, or with --together all loaded at once and measured in turn, shape by shape: what drifts on a
machine is then the same for all of them. The GPU has to hold all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nsa_backend_plugin.arms import Arm, parse_arms, parse_shapes
from nsa_backend_plugin.files import check_writable, write_json
from nsa_backend_plugin.serving import Child

_PROGRAM = [sys.executable, "-m", "nsa_backend_plugin.engine.layer_profile"]
#: SGLang's names for the model, and the file that may hold it.
_MODEL_OPTIONS = {"--model-path", "--model", "--config"}
_POLL_SECONDS = 0.1
#: Of a prompt's kernels, what a kernel takes to be printed. The JSON has them all.
_LEAST_SHARE = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arms", nargs="+", default=["nsa_plugin", "dsa"], help='BACKEND or "BACKEND NAME=VALUE --flag=value"'
    )
    parser.add_argument("--shapes", nargs="+", default=["1:8192", "16:8192", "64:8192"], help="BATCH:CONTEXT")
    parser.add_argument("--prompts", nargs="*", type=int, default=[], metavar="TOKENS", help="first tokens, too")
    parser.add_argument("--no-kernels", action="store_true", help="times alone: tracing takes seconds")
    parser.add_argument("--together", action="store_true", help="load all arms at once, measure them in turn")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--brief", action="store_true", help="print the summary table only")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to load an arm, and for each shape of it")
    parser.add_argument("server_args", nargs="*", help="arguments of sglang.launch_server, behind `--`")


def run(options: argparse.Namespace) -> int:
    try:
        arms = _checked(options)
    except ValueError as refusal:
        print(f"nsa-plugin profile: {refusal}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    groups = [arms] if options.together else [[arm] for arm in arms]
    failed = not all([_measure(group, options, rows) for group in groups])
    failed = failed or any("error" in row for row in rows)
    if not options.brief:
        for row in rows:
            _print_kernels(row)
    _print_table(rows)
    if options.json:
        write_json(options.json, {"command": sys.argv, "rows": rows})
    return int(failed)


def _checked(options: argparse.Namespace) -> list[Arm]:
    """The arms. Raises ValueError for whatever would make a run fail or lose its result."""
    arms = parse_arms(options.arms)
    parse_shapes(options.shapes)
    if not options.timeout > 0:  # nan is not either
        raise ValueError(f"--timeout {options.timeout:g}: expected more than 0")
    for length in options.prompts:
        if length < 1:
            raise ValueError(f"--prompts {length}: expected at least 1")
    if options.json:
        check_writable("--json", options.json)
    for arm in arms:
        if not {word.partition("=")[0] for word in (*options.server_args, *arm.args)} & _MODEL_OPTIONS:
            raise ValueError(f"no --model-path for the arm {arm.text!r}: expected `-- --model-path MODEL` at the end")
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU: a layer's kernels are profiled on a CUDA or ROCm device only")
    return arms


class _ArmError(Exception):
    """An arm's process died or gave no answer in time; the message ends with the tail of its log."""


class _ArmProcess(Child):
    """engine/layer_profile.py with the backend, variables and arguments of an arm. It loads at once."""

    def __init__(self, arm: Arm, options: argparse.Namespace, folder: Path):
        self.arm = arm
        self._output = folder / "rows.jsonl"
        self._answers = 0
        self._timeout = options.timeout
        self._deadline = time.monotonic() + self._timeout
        command = [*_PROGRAM, "--output", str(self._output), *["--no-kernels"] * options.no_kernels]
        command += ["--attention-backend", arm.backend, *options.server_args, *arm.args]
        super().__init__(command, arm.env, folder / "log", takes_lines=True)

    def measure(self, point: str) -> dict[str, Any]:
        """The row of a shape or a prompt. Raises _ArmError."""
        self._deadline = time.monotonic() + self._timeout
        self.send(point)
        return {"arm": self.arm.text, **self.answer()}

    def answer(self) -> dict[str, Any]:
        """The next line of its output, the first when it has loaded. Raises _ArmError."""
        while True:
            code = self.wait(_POLL_SECONDS)  # before the look at the file: it may answer and end
            text = self._output.read_text() if self._output.exists() else ""
            lines = text.split("\n")[:-1]  # a long line arrives in parts
            if len(lines) > self._answers:
                answer: dict[str, Any] = json.loads(lines[self._answers])
                self._answers += 1
                return answer
            if code is not None:
                raise _ArmError(f"exit {code}\n{self.log_tail()}")
            if time.monotonic() > self._deadline:
                raise _ArmError(f"no result within {self._timeout:.0f} s\n{self.log_tail()}")


def _measure(arms: list[Arm], options: argparse.Namespace, rows: list[dict[str, Any]]) -> bool:
    """Measure arms in turn, point by point, into `rows`; an arm that fails is named and ended. True: none did."""
    with contextlib.ExitStack() as stack:
        alive = []
        for arm in arms:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            alive.append(stack.enter_context(_ArmProcess(arm, options, folder)))
        for point in (None, *options.shapes, *map(str, options.prompts)):
            for process in list(alive):
                try:
                    if point is None:
                        process.answer()
                    else:
                        rows.append(process.measure(point))
                except _ArmError as error:
                    print(f"{process.arm.text}: {error}", file=sys.stderr)
                    process.stop()
                    alive.remove(process)
        return len(alive) == len(arms)


def _print_kernels(row: dict[str, Any]) -> None:
    if not {"error", "attention", "kernels"} & row.keys():
        return
    print(f"\n{row['arm']} {_point(row)}")
    if "error" in row:
        print(f"  {row['error']}")
        return
    whole = sum(kernel["us"] for kernel in row.get("kernels", ()))
    for kernel in row.get("kernels", ()):
        share = kernel["us"] / whole
        if share >= _LEAST_SHARE:
            print(f"  {kernel['us']:10.1f} us {share:5.0%} {kernel['launches']:5} x {kernel['name'][:120]}")
    for kernel in row.get("attention", {}).get("kernels", ()):
        print(f"  {kernel['start_us']:8.1f} {kernel['us']:7.2f} us  stream {kernel['stream']}  {kernel['name'][:120]}")


def _point(row: dict[str, Any]) -> str:
    return f"prompt {row['prompt']}" if "prompt" in row else f"batch {row['batch']} context {row['context']}"


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Decode steps with their layers, then first tokens; a cell of what was not measured is empty."""
    width = max((len(row["arm"]) for row in rows), default=3)
    shapes = sorted((r for r in rows if "batch" in r), key=lambda r: (r["context"], r["batch"]))
    titles = f"{'step us':>9} {'attention us':>13} {'launches':>9} {'< 3 us':>7}"
    print(f"\n{'batch':>5} {'context':>8} {'arm':>{width}} {titles}")
    for row in shapes:
        head = f"{row['batch']:5} {row['context']:8} {row['arm']:>{width}}"
        if "error" in row:
            print(f"{head} {row['error'][:100]}")
            continue
        line = f"{head} {row['step_us']:9.1f}"
        if layer := row.get("attention"):
            line += f" {layer['span_us']:13.1f} {layer['launches']:9} {layer['short_launches']:7}"
        print(line)
    prompts = sorted((r for r in rows if "prompt" in r), key=lambda r: r["prompt"])
    if prompts:
        print(f"\n{'prompt':>14} {'arm':>{width}} {'first token ms':>15}")
    for row in prompts:
        cell = row["error"][:100] if "error" in row else f"{row['first_token_ms']:15.2f}"
        print(f"{row['prompt']:14} {row['arm']:>{width}} {cell}")
