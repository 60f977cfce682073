"""Measure the engine on a GPU host, plugin and stock SGLang side by side: one layer's kernels, and served decode steps.

    python benchmarks/engine_h200.py --out results/ layers --family v32 --kv fp8_e4m3 --shapes 1:8192 64:8192
    python benchmarks/engine_h200.py --out results/ served --family v32 --kv fp8_e4m3 --batches 1 16 64

`layers` profiles random-weight models in process (`nsa-plugin profile`). `served` starts one real server per arm, sends
`--context`-token prompts and reads decode throughput from the server's own log. Each writes one JSON with the
environment, named after what was measured. Stock is `dsa` for models with an indexer and `fa3` and `triton` for v3.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
for folder in (str(REPO / "src"), str(REPO / "benchmarks")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from engine_model import FAMILIES, VOCAB, write_model  # noqa: E402
from environment import collect  # noqa: E402

from nsa_backend_plugin.serving import Server  # noqa: E402

STOCK = {"v32": ("dsa",), "glm": ("dsa",), "v3": ("fa3", "triton")}
SERVER_ARGS = (
    "--load-format=dummy",
    "--cuda-graph-backend-prefill=disabled",
    "--mem-fraction-static=0.6",
    "--sampling-backend=pytorch",
    "--grammar-backend=none",
    "--disable-radix-cache",
    "--skip-server-warmup",
)
_STEP = re.compile(r"#running-req: (\d+), .*gen throughput \(token/s\): ([0-9.]+)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "results")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("layers", layers), ("served", served)):
        child = commands.add_parser(name)
        child.add_argument("--family", choices=FAMILIES, default="v32")
        child.add_argument("--kv", default="fp8_e4m3", help="--kv-cache-dtype of every arm")
        child.add_argument("--heads", type=int, default=16)
        child.add_argument("--layers", type=int, default=8)
        child.add_argument("--arms", nargs="+", help="default: nsa_plugin and stock")
        child.add_argument("--max-total-tokens", type=int, default=700_000)
        child.set_defaults(run=run)
        if name == "layers":
            child.add_argument("--shapes", nargs="+", default=["1:8192", "16:8192", "64:8192"])
        else:
            child.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
            child.add_argument("--context", type=int, default=8192)
            child.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.arms = options.arms or ["nsa_plugin", *STOCK[options.family]]
    return options.run(options)


def _server_args(options: argparse.Namespace, batches: list[int]) -> list[str]:
    args = [*SERVER_ARGS, f"--max-total-tokens={options.max_total_tokens}", f"--max-running-requests={max(batches)}"]
    if options.kv != "auto":
        args.append(f"--kv-cache-dtype={options.kv}")
    return [*args, "--cuda-graph-bs-decode", *map(str, sorted(set(batches)))]


def _write(options: argparse.Namespace, kind: str, body: dict[str, Any]) -> None:
    name = f"{kind}-{options.family}-{options.kv}-h{options.heads}-h200.json"
    setting = {k: v for k, v in vars(options).items() if isinstance(v, (str, int, list))}
    content = {"environment": collect("cuda:0"), "options": setting, **body}
    (options.out / name).write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {name}")


def layers(options: argparse.Namespace) -> int:
    batches = [int(shape.split(":")[0]) for shape in options.shapes]
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", options.family, options.heads, options.layers)
        output = Path(folder) / "layers.json"
        command = [sys.executable, "-m", "nsa_backend_plugin.cli", "profile", "--brief", "--json", str(output)]
        command += ["--arms", *options.arms, "--shapes", *options.shapes, "--timeout", "200"]
        command += ["--", f"--model-path={model}", *_server_args(options, batches)]
        code = subprocess.run(command, check=False).returncode
        if output.exists():
            _write(options, "layers", {"rows": json.loads(output.read_text())["rows"]})
    return code


def served(options: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model", options.family, options.heads, options.layers)
        for arm in options.arms:
            log = options.out / f"served-{options.family}-{options.kv}-{arm}.log"
            args = [f"--attention-backend={arm}", "--decode-log-interval=20", *_server_args(options, options.batches)]
            with Server(model, args, log_path=log, timeout=400) as server:
                rows += [_decode_step(server, arm, batch, options) for batch in options.batches]
    _write(options, "served", {"rows": rows})
    _print_served(rows)
    return 0


def _decode_step(server: Server, arm: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Best decode step that the server logs while exactly `batch` requests run."""
    seen = len(server.log_path.read_text(errors="replace"))
    sampling = {"temperature": 0, "max_new_tokens": options.tokens, "ignore_eos": True}

    def ask(seed: int) -> None:
        prompt = random.Random(seed).choices(range(3, VOCAB), k=options.context)
        server.post("/generate", {"input_ids": prompt, "sampling_params": sampling}, timeout=300)

    with ThreadPoolExecutor(batch) as pool:
        list(pool.map(ask, range(batch)))
    lines = _STEP.findall(server.log_path.read_text(errors="replace")[seen:])
    rates = [float(rate) for running, rate in lines if int(running) == batch]
    best = max(rates, default=0.0)
    return {
        "arm": arm,
        "batch": batch,
        "context": options.context,
        "tokens_per_second": best,
        "step_us": round(1e6 * batch / best, 1) if best else None,
        "log_lines": len(rates),
    }


def _print_served(rows: list[dict[str, Any]]) -> None:
    ours = {r["batch"]: r["step_us"] for r in rows if r["arm"] == "nsa_plugin"}
    print(f"{'batch':>5} {'arm':>12} {'step us':>9} {'stock / plugin':>15}")
    for row in sorted(rows, key=lambda r: r["batch"]):
        mine = ours.get(row["batch"])
        ratio = f"{row['step_us'] / mine:15.2f}" if mine and row["step_us"] else ""
        print(f"{row['batch']:5} {row['arm']:>12} {row['step_us'] or 0:9.1f} {ratio}")


if __name__ == "__main__":
    sys.exit(main())
