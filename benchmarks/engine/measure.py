"""Measure the engine on a GPU host, plugin and stock SGLang side by side: one layer's kernels, and served decode steps.

    python -m benchmarks layers --family v32 --kv fp8_e4m3 --shapes 1:8192 64:8192
    python -m benchmarks served --family v32 --kv fp8_e4m3 --shapes 1:8192 64:8192

`layers` profiles random-weight models in process (`nsa-plugin profile`). `served` starts one real server per arm, with
SGLang's own prefill graphs. It times the start, then the first token of prompts that no cache has seen, then sends
BATCH prompts of CONTEXT tokens at a time and reads decode throughput from the server's own log; prompts are prefixes of
each other, so that the radix cache saves most of the prefill. Each writes one JSON with the environment, named after
what was measured. An arm is "BACKEND NAME=VALUE --flag=value"; ratios are against the first one. Stock is `dsa` for
models with an indexer and `fa3` and `triton` for v3.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.engine import output
from benchmarks.engine.model import FAMILIES, VOCAB, write_model
from benchmarks.run.environment import of_children
from nsa_backend_plugin.arms import Arm, parse_arms
from nsa_backend_plugin.engine.layer_profile import DECODED_TOKENS
from nsa_backend_plugin.serving import Server

STOCK = {"v32": ("dsa",), "glm": ("dsa",), "v3": ("fa3", "triton")}
SERVER_ARGS = (
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--skip-server-warmup",
)
FIRST_TOKEN_REPEATS = 5
_STEP = re.compile(r"#running-req: (\d+), .*gen throughput \(token/s\): ([0-9.]+)")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("layers", layers), ("served", served)):
        child = commands.add_parser(name)
        child.add_argument("--family", choices=FAMILIES, default="v32")
        child.add_argument("--kv", default="fp8_e4m3", help="--kv-cache-dtype of every arm")
        child.add_argument("--heads", type=int, default=16)
        child.add_argument("--layers", type=int, default=8, help="served steps of few layers are bound by the host")
        child.add_argument("--arms", nargs="+", help="default: nsa_plugin and stock")
        child.add_argument("--shapes", nargs="+", default=["1:8192", "16:8192", "64:8192"], help="BATCH:CONTEXT")
        output.add_arguments(child)
        child.set_defaults(run=run)
        if name == "served":
            child.add_argument("--tokens", type=int, default=200, help="decoded per request and shape")
            child.add_argument("--first-token", type=int, nargs="*", default=[1024, 8192, 32768], help="prompt lengths")
            child.add_argument("--shared", type=int, default=0, help="leading tokens that all prompts have in common")
    return parser


def main(words: Sequence[str]) -> int:
    options = arguments().parse_args(words)
    options.arms = options.arms or ["nsa_plugin", *STOCK[options.family]]
    try:
        parse_arms(options.arms)
        path = output.prepare(options, options.command, options.family, options.kv, f"h{options.heads}")
    except ValueError as error:
        print(f"benchmarks {options.command}: error: {error}", file=sys.stderr)
        return 2
    return options.run(options, path)


def _shapes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(batch, context), each prompt's longer versions after its shorter ones, so that none is computed twice."""
    pairs = [(int(batch), int(context)) for batch, _, context in (s.partition(":") for s in options.shapes)]
    return sorted(pairs, key=lambda pair: (pair[1], -pair[0]))


def _cache_tokens(shapes: list[tuple[int, int]], decoded: int) -> int:
    """Tokens of every prompt's longest version and of what is decoded, rounded up to pages of at most 128 tokens."""
    longest = (max(c for b, c in shapes if b > i) for i in range(max(b for b, _ in shapes)))
    return sum(longest) + sum(b for b, _ in shapes) * (decoded + 128) + 8192


def server_args(kv: str, batches: Iterable[int], cache_tokens: int, memory: float = 0.6) -> list[str]:
    """Of every arm. memory: of the GPU's that is free when an arm starts, what weights and cache may take."""
    sizes = sorted(set(batches))
    # One more than run: SGLang counts a request whose prefill is in chunks twice, and would keep the last one waiting.
    args = [*SERVER_ARGS, f"--mem-fraction-static={memory}"]
    args += [f"--max-total-tokens={cache_tokens}", f"--max-running-requests={sizes[-1] + 1}"]
    if kv != "auto":
        args.append(f"--kv-cache-dtype={kv}")
    return [*args, "--cuda-graph-bs-decode", *map(str, sizes)]


def _server_args(options: argparse.Namespace, cache_tokens: int) -> list[str]:
    return server_args(options.kv, (batch for batch, _ in _shapes(options)), cache_tokens)


def profiled_tokens(context: int) -> int:
    """Cache slots of a sequence whose decode steps `nsa-plugin profile` measures, in pages of at most 128 tokens."""
    return -(-(context + DECODED_TOKENS) // 128) * 128


def layers(options: argparse.Namespace, results: Path) -> int:
    needed = max(batch * profiled_tokens(context) for batch, context in _shapes(options))
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", options.family, options.heads, options.layers)
        profile = Path(folder) / "layers.json"
        command = [sys.executable, "-m", "nsa_backend_plugin.cli", "profile", "--brief", "--json", str(profile)]
        command += ["--arms", *options.arms, "--shapes", *options.shapes, "--timeout", "200"]
        # Decode alone is profiled: no graphs of prefill are captured for it.
        command += ["--", f"--model-path={model}", "--cuda-graph-backend-prefill=disabled"]
        command += _server_args(options, needed)
        code = subprocess.run(command, env=of_children(), check=False).returncode
        if profile.exists():
            output.save(results, options, json.loads(profile.read_text())["rows"])
    return code


def served(options: argparse.Namespace, results: Path) -> int:
    rows: list[dict[str, Any]] = []
    shapes = _shapes(options)
    longest = max(options.first_token, default=0)
    cache_tokens = _cache_tokens(shapes, options.tokens) + 2 * longest
    args = ["--decode-log-interval=20", *_server_args(options, cache_tokens)]
    starts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", options.family, options.heads, options.layers)
        for arm in parse_arms(options.arms):
            start, steps = _serve_arm(arm, model, args, shapes, options)
            starts.append(start)
            rows += steps
            output.save(results, options, rows, starts=starts)
    for start in starts:
        print(f"{start['arm']}: healthy after {start['healthy_s']} s; first token, ms: {start['first_token_ms']}")
    _print_served(rows)
    unmeasured = [f"{row['arm']} {row['batch']}:{row['context']}" for row in rows if row["step_us"] is None]
    if unmeasured:  # the requests ended before all of a batch ran
        print(f"no decode step of the whole batch in the log: {', '.join(unmeasured)}; expected more --tokens")
    return int(bool(unmeasured))


def _serve_arm(
    arm: Arm, model: Path, args: list[str], shapes: list[tuple[int, int]], options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(start and first tokens, decode steps) of one server."""
    log = options.out / f"served-{options.family}-{options.kv}-{arm.file_name}.log"
    command = [f"--attention-backend={arm.backend}", *args, *arm.args]
    begin = time.monotonic()
    with Server(model, command, env=arm.env, log_path=log, timeout=400) as server:
        start = {"arm": arm.text, "healthy_s": round(time.monotonic() - begin, 1)}
        start["first_token_ms"] = {length: _first_token_ms(server, length) for length in options.first_token}
        steps = [
            {"arm": arm.text, **_decode_step(server, batch, context, options.tokens, options.shared)}
            for batch, context in shapes
        ]
    return start, steps


def _first_token_ms(server: Server, length: int) -> float:
    """Median of a few requests for one token, each with a prompt of its own, after one that warms up."""
    times = []
    for number in range(1 + FIRST_TOKEN_REPEATS):
        prompt = _prompt(f"first token {number} of {length}", length, 0)
        begin = time.monotonic()
        server.post("/generate", {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}}, timeout=300)
        times.append(1e3 * (time.monotonic() - begin))
    return round(statistics.median(times[1:]), 1)


def _prompt(seed: int | str, context: int, shared: int) -> list[int]:
    """`context` tokens, the first `shared` of them the same for every seed, the last page of them never."""
    common = random.Random("shared").choices(range(3, VOCAB), k=min(shared, context - 64)) if shared else []
    return common + random.Random(seed).choices(range(3, VOCAB), k=context - len(common))


def _decode_step(server: Server, batch: int, context: int, tokens: int, shared: int) -> dict[str, Any]:
    """Median decode step that the server logs while exactly `batch` requests run.

    Asked twice if they never do: some may arrive late, or wait for a kernel that is compiled for their prefill.
    """
    step = _try_step(server, batch, context, tokens, shared)
    if step["step_us"] is None:
        step = _try_step(server, batch, context, tokens, shared)
    return {"batch": batch, "context": context, **step}


def _try_step(server: Server, batch: int, context: int, tokens: int, shared: int) -> dict[str, Any]:
    seen = len(server.log_path.read_text(errors="replace"))
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}

    def ask(seed: int) -> None:
        body = {"input_ids": _prompt(seed, context, shared), "sampling_params": sampling}
        server.post("/generate", body, timeout=300)

    if shared:
        ask(0)  # into the radix cache
    with ThreadPoolExecutor(batch) as pool:
        list(pool.map(ask, range(batch)))
    return _median_step(server.log_path.read_text(errors="replace")[seen:], batch)


def _median_step(log: str, batch: int) -> dict[str, Any]:
    rates = [float(rate) for running, rate in _STEP.findall(log) if int(running) == batch]
    rates = rates[1:]  # the first interval began before the batch was whole
    median = statistics.median(rates) if rates else 0.0
    step_us = round(1e6 * batch / median, 1) if median else None
    return {"tokens_per_second": median, "step_us": step_us, "log_lines": len(rates)}


def _print_served(rows: list[dict[str, Any]]) -> None:
    first = {(r["context"], r["batch"]): r["step_us"] for r in rows if r["arm"] == rows[0]["arm"]}
    width = max(len(row["arm"]) for row in rows)
    print(f"{'context':>8} {'batch':>5} {'arm':>{width}} {'step us':>9} {'x first arm':>12}")
    for row in sorted(rows, key=lambda r: (r["context"], r["batch"])):
        mine = first.get((row["context"], row["batch"]))
        ratio = f"{row['step_us'] / mine:12.2f}" if mine and row["step_us"] else ""
        print(f"{row['context']:8} {row['batch']:5} {row['arm']:>{width}} {row['step_us'] or 0:9.1f} {ratio}")
