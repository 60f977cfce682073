"""Ordered kernel list of one decode layer, backends side by side.

Each arm is an attention backend with variables and arguments of its own, run in a process of its own on the same model,
shapes and cache contents. Printed per arm and shape: decode step, attention span and launches of one layer, and every
kernel with its stream and time.

    nsa-plugin profile --arms nsa_plugin dsa --shapes 1:8192 64:8192 --json layers.json -- --model-path M ...
    nsa-plugin profile --arms nsa_plugin "nsa_plugin NSA_PLUGIN_DUAL_STREAM=0" -- --model-path M ...
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from nsa_backend_plugin.arms import Arm, parse_arms, parse_shapes
from nsa_backend_plugin.files import check_writable, write_json

_PROGRAM = [sys.executable, "-m", "nsa_backend_plugin.engine.layer_profile"]
#: SGLang's names for the model, and the file that may hold it.
_MODEL_OPTIONS = {"--model-path", "--model", "--config"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arms", nargs="+", default=["nsa_plugin", "dsa"], help='BACKEND or "BACKEND NAME=VALUE --flag=value"'
    )
    parser.add_argument("--shapes", nargs="+", default=["1:8192", "16:8192", "64:8192"], help="BATCH:CONTEXT")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--brief", action="store_true", help="print the summary table only")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one arm")
    parser.add_argument("server_args", nargs="*", help="arguments of sglang.launch_server, behind `--`")


def run(options: argparse.Namespace) -> int:
    try:
        arms = _checked(options)
    except ValueError as refusal:
        print(f"nsa-plugin profile: {refusal}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    failed = False
    for arm in arms:
        arm_rows, error = _run_arm(arm, options)
        rows += arm_rows
        if error:
            failed = True
            print(f"{arm.text}: {error}", file=sys.stderr)
    failed = failed or any("error" in row for row in rows)
    if not options.brief:
        for row in rows:
            _print_layer(row)
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
    if options.json:
        check_writable("--json", options.json)
    for arm in arms:
        if not {word.partition("=")[0] for word in (*options.server_args, *arm.args)} & _MODEL_OPTIONS:
            raise ValueError(f"no --model-path for the arm {arm.text!r}: expected `-- --model-path MODEL` at the end")
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch sees no GPU: a layer's kernels are profiled on a CUDA or ROCm device only")
    return arms


def _run_arm(arm: Arm, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """(finished rows, why the arm failed or "")."""
    from nsa_backend_plugin.serving import Child

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        command = [*_PROGRAM, "--output", str(output), "--shapes", *options.shapes]
        command += ["--attention-backend", arm.backend, *options.server_args, *arm.args]
        with Child(command, arm.env, Path(folder) / "log") as child:
            code = child.wait(options.timeout)
            error = {None: f"no result within {options.timeout:.0f} s", 0: ""}.get(code, f"exit {code}")
            if error:
                error += f"\n{child.log_tail()}"
        lines = output.read_text().splitlines() if output.exists() else []
    return [{"arm": arm.text, **json.loads(line)} for line in lines], error


def _print_layer(row: dict[str, Any]) -> None:
    print(f"\n{row['arm']} batch {row['batch']} context {row['context']}")
    if "error" in row:
        print(f"  {row['error']}")
        return
    for kernel in row["attention"]["kernels"]:
        print(f"  {kernel['start_us']:8.1f} {kernel['us']:7.2f} us  stream {kernel['stream']}  {kernel['name'][:120]}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    titles = ("step us", "attention us", "launches", "< 3 us")
    width = max((len(row["arm"]) for row in rows), default=3)
    print(
        f"\n{'batch':>5} {'context':>8} {'arm':>{width}} {titles[0]:>9} {titles[1]:>13} {titles[2]:>9} {titles[3]:>7}"
    )
    for row in sorted(rows, key=lambda r: (r["context"], r["batch"])):
        head = f"{row['batch']:5} {row['context']:8} {row['arm']:>{width}}"
        if "error" in row:
            print(f"{head} {row['error'][:100]}")
            continue
        layer = row["attention"]
        print(
            f"{head} {row['step_us']:9.1f} {layer['span_us']:13.1f} {layer['launches']:9} {layer['short_launches']:7}"
        )
