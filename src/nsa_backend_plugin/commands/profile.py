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
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_backend_plugin.accuracy.arms import Arm


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
    from nsa_backend_plugin.accuracy.arms import parse_arms

    rows: list[dict[str, Any]] = []
    failed = False
    try:
        arms = parse_arms(options.arms)
    except ValueError as refusal:
        print(f"nsa-plugin profile: {refusal}", file=sys.stderr)
        return 2
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
        options.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n")
    return int(failed)


def _run_arm(arm: Arm, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """(finished rows, why the arm failed or "")."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        command = [sys.executable, "-m", "nsa_backend_plugin.engine.layer_profile", "--output", str(output)]
        command += ["--shapes", *options.shapes, "--attention-backend", arm.backend, *options.server_args]
        command += arm.args
        error = ""
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **arm.env},
                timeout=options.timeout,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                error = f"exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        except subprocess.TimeoutExpired:
            error = f"no result within {options.timeout:.0f} s"
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
