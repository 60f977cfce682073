"""Decode steps and first tokens over a grid, plugin and stock SGLang side by side, in process.

    python -m benchmarks grid --family v32 --kv fp8_e4m3 --heads 16 128
    python -m benchmarks grid --batches 1 16 --contexts 8192 --prompts --arms nsa_plugin dsa "dsa --page-size=64"

For each head count a random-weight model, on which `nsa-plugin profile` loads all arms at once and measures them in
turn, point by point: what drifts on a machine is then the same for all of them. A step is what a server with SGLang's
overlapped scheduler pays, the longer of host and GPU; a first token is one prompt's prefill, without HTTP and
tokenizing. Writes one JSON per head count. Ratios are times over the first arm's: above 1 the first arm is faster.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import output
from benchmarks.engine.measure import STOCK, profiled_tokens, server_args
from benchmarks.engine.model import FAMILIES, write_model
from benchmarks.engine.serving import positive
from benchmarks.report.screen import Line, console, print_table
from benchmarks.run.environment import of_children
from nsa_backend_plugin.arms import parse_arms

#: SGLang takes what is free once an arm's weights are loaded, less this part's rest of what was free before; what other
#: arms hold is not free. --max-total-tokens keeps each from taking it all.
MEMORY = 0.85


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks grid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--family", choices=FAMILIES, default="v32")
    made.add_argument("--kv", default="fp8_e4m3", help="--kv-cache-dtype of every arm")
    made.add_argument("--heads", nargs="+", type=positive, default=[16], metavar="N", help="a model for each")
    made.add_argument("--layers", type=positive, default=20, metavar="N", help="steps of few are bound by the host")
    made.add_argument("--arms", nargs="+", help="default: nsa_plugin and stock")
    made.add_argument("--batches", nargs="+", type=positive, default=[1, 4, 16, 32, 64, 128], metavar="N")
    made.add_argument("--contexts", nargs="+", type=positive, default=[1024, 8192, 32768], metavar="N")
    made.add_argument(
        "--most-tokens", type=positive, default=2_200_000, metavar="N", help="of a batch; larger are left out"
    )
    made.add_argument("--prompts", nargs="*", type=positive, default=[1024, 4096, 8192, 32768], metavar="N")
    output.add_arguments(made)
    return made


def main(words: Sequence[str]) -> int:
    options = parser().parse_args(words)
    options.arms = options.arms or ["nsa_plugin", *STOCK[options.family]]
    shapes = points(options)
    try:
        parse_arms(options.arms)
        if not shapes:
            raise ValueError(f"--most-tokens={options.most_tokens}: expected at least the smallest batch of a context")
        paths = {h: output.prepare(options, "grid", options.family, options.kv, f"h{h}") for h in options.heads}
    except ValueError as error:
        print(f"benchmarks grid: error: {error}", file=sys.stderr)
        return 2
    return max([measure(heads, shapes, options, path) for heads, path in paths.items()])


def points(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(batch, context) of the grid, without those whose batch has too many tokens."""
    pairs = [(batch, context) for context in options.contexts for batch in options.batches]
    return [(batch, context) for batch, context in pairs if batch * context <= options.most_tokens]


def command(model: Path, profile: Path, shapes: Sequence[tuple[int, int]], options: argparse.Namespace) -> list[str]:
    """`nsa-plugin profile` of a model, its rows into the file `profile`."""
    needed = max(batch * profiled_tokens(context) for batch, context in shapes)
    words = [sys.executable, "-m", "nsa_backend_plugin.cli", "profile", "--together", "--no-kernels"]
    words += ["--json", str(profile), "--arms", *options.arms]
    words += ["--shapes", *(f"{batch}:{context}" for batch, context in shapes)]
    words += ["--prompts", *map(str, options.prompts), "--", f"--model-path={model}"]
    if not options.prompts:  # no graphs of prefill are captured for nothing
        words.append("--cuda-graph-backend-prefill=disabled")
    needed = max(needed, *(prompt + 128 for prompt in options.prompts), 0)
    return [*words, *server_args(options.kv, (batch for batch, _ in shapes), needed, MEMORY)]


def measure(heads: int, shapes: Sequence[tuple[int, int]], options: argparse.Namespace, path: Path) -> int:
    """All points of one head count: saved and shown. Exit code of the profile."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", options.family, heads, options.layers)
        profile = Path(folder) / "rows.json"
        code = subprocess.run(command(model, profile, shapes, options), env=of_children(), check=False).returncode
        if not profile.exists():
            return code
        rows = json.loads(profile.read_text())["rows"]
    output.save(path, argparse.Namespace(**{**vars(options), "heads": heads}), rows)
    show(rows, options.arms, f"{options.family}, {options.kv}, {heads} heads, {options.layers} layers")
    print(f"wrote {path}")
    return code


def show(rows: Sequence[dict[str, Any]], arms: Sequence[str], title: str) -> None:
    """A line per point: every arm's time, and how many times the first arm's it is; "error" where an arm has one."""
    columns = [arms[0], *(column for arm in arms[1:] for column in (arm, "x"))]
    groups: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in rows:
        heading, name = "first token, ms", str(row.get("prompt"))
        if "batch" in row:
            heading, name = f"decode step, us: context {row['context']}, batch", str(row["batch"])
        time = None if "error" in row else row["step_us"] if "batch" in row else row["first_token_ms"]
        groups.setdefault(heading, {}).setdefault(name, {})[row["arm"]] = time
    tables = [(h, [Line(name, _cells(times, arms)) for name, times in lines.items()]) for h, lines in groups.items()]
    print(f"\n{title}")
    print_table(console(), columns, tables)


def _cells(times: dict[str, float | None], arms: Sequence[str]) -> list[str]:
    mine = times.get(arms[0])
    cells = []
    for arm in arms:
        time = times.get(arm)
        cells.append(f"{time:.1f}" if time else "error" if arm in times else "")
        cells.append(f"{time / mine:.3f}" if time and mine else "")
    return [cells[0], *cells[2:]]
