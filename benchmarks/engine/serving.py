"""Servers under load, the plugin beside stock SGLang, driven by SGLang's own client (`sglang.bench_serving`).

    python -m benchmarks serving --model-path MODEL -- --tp 8 --kv-cache-dtype fp8_e4m3
    python -m benchmarks serving --model-path MODEL --arms plugin stock "stock --dsa-decode-backend=fa3"

Each arm is one server after the other: random token ids with fixed seeds, prompts and answers of fixed length, the
prefix cache emptied before every point. An arm is "BACKEND NAME=VALUE --flag=value"; `plugin` is nsa_plugin, `stock` is
what SGLang chooses without --attention-backend, the plugin switched off. What follows `--` goes to every server.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import write
from benchmarks.engine import output
from benchmarks.report.screen import Line, console, print_table
from nsa_backend_plugin import BACKEND_NAME
from nsa_backend_plugin.arms import Arm, parse_arms
from nsa_backend_plugin.serving import Server, ServerError

STOCK = "stock"
CLIENT = (sys.executable, "-m", "sglang.bench_serving")
#: Key of a row, the client's own name for it, heading of its column.
METRICS = (
    ("ttft_ms", "median_ttft_ms", "TTFT ms"),
    ("ttft_p99_ms", "p99_ttft_ms", "p99"),
    ("tpot_ms", "median_tpot_ms", "TPOT ms"),
    ("tpot_p99_ms", "p99_tpot_ms", "p99 "),
    ("tokens_per_s", "output_throughput", "output token/s"),
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model-path", type=Path, required=True, help="checkpoint folder")
    made.add_argument("--arms", nargs="+", default=["plugin", "stock"], metavar="ARM")
    made.add_argument("--shapes", nargs="+", type=shape, default=[(1024, 1024), (8192, 1024)], metavar="IN:OUT")
    made.add_argument("--concurrency", nargs="+", type=positive, default=[4, 8, 16, 32, 64], metavar="N")
    made.add_argument("--rounds", type=positive, default=4, metavar="N", help="requests per point, times concurrency")
    made.add_argument("--seed", type=int, default=1, help="of the first point; each point has its own")
    made.add_argument("--start-seconds", type=positive, default=1200, metavar="S", help="until a server is healthy")
    made.add_argument("--point-seconds", type=positive, default=1800, metavar="S", help="until a point is measured")
    output.add_arguments(made)
    return made


def positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """Tokens of a prompt and of its answer."""
    prompt, _, answer = text.partition(":")
    return positive(prompt), positive(answer)


def arms_of(texts: Sequence[str]) -> list[Arm]:
    """`plugin` by its backend's name; `stock` without a backend. Raises ValueError for a bad arm."""
    names = {"plugin": BACKEND_NAME, STOCK: ""}
    more = {STOCK: {"NSA_PLUGIN_DISABLE": "1"}}
    return [
        dataclasses.replace(arm, backend=names.get(arm.backend, arm.backend), env=more.get(arm.backend, {}) | arm.env)
        for arm in parse_arms(list(texts))
    ]


def main(words: Sequence[str]) -> int:
    mine, extra = list(words), []
    if "--" in mine:
        mine, extra = mine[: mine.index("--")], mine[mine.index("--") + 1 :]
    options = parser().parse_args(mine)
    try:
        arms = arms_of(options.arms)
        if not options.model_path.is_dir():
            raise ValueError(f"--model-path={options.model_path}: expected a folder")
        if problem := client_problem():
            raise ValueError(f"sglang.bench_serving does not run here: {problem}")
        path = output.prepare(options, "serving", options.model_path.resolve().name)
        picture = path.with_suffix(".png")
        if picture.exists() and not options.force:
            raise ValueError(f"{picture}: exists; --force replaces it")
    except ValueError as error:
        print(f"benchmarks serving: error: {error}", file=sys.stderr)
        return 2
    options.server_args = extra
    rows: list[dict[str, Any]] = []
    failed = []
    for arm in arms:
        try:
            measure_arm(arm, options, rows, path)
        except (ServerError, RuntimeError) as error:
            failed.append(arm.text)
            print(f"{arm.text}: {error}", file=sys.stderr)
    if not rows:
        return 1
    show(rows)
    draw(rows, picture)
    print(f"wrote {path} and {picture.name}")
    return int(bool(failed))


def client_problem() -> str | None:
    """The client's own words when it cannot be imported: it needs more of SGLang's requirements than a server does."""
    done = subprocess.run([*CLIENT, "--help"], capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def measure_arm(arm: Arm, options: argparse.Namespace, rows: list[dict[str, Any]], path: Path) -> None:
    """One server, every point. Raises ServerError when it does not start or dies, RuntimeError when a point fails."""
    points = [(pair, n) for pair in options.shapes for n in options.concurrency]
    chosen = [f"--attention-backend={arm.backend}"] if arm.backend else []
    log = options.out / f"{path.stem}-{arm.file_name}.log"
    print(f"{arm.text}: starting, log in {log}", flush=True)
    arguments = [*chosen, *options.server_args, *arm.args]
    with Server(options.model_path, arguments, env=arm.env, log_path=log, timeout=options.start_seconds) as server:
        for i, ((prompt, answer), concurrency) in enumerate(points):
            result = ask(server, options, prompt, answer, concurrency, options.seed + i, log.with_suffix(".client.log"))
            row = {"arm": arm.text, "prompt": prompt, "answer": answer, "concurrency": concurrency}
            row |= {key: round(result[name], 3) for key, name, _ in METRICS}
            rows.append({**row, "requests": result["completed"], "duration_s": round(result["duration"], 1)})
            output.save(path, options, rows)
            named = zip(METRICS, cells(row), strict=True)
            numbers = ", ".join(f"{title.strip()} {cell}" for (_, _, title), cell in named)
            print(f"[{i + 1}/{len(points)}] {arm.text} {prompt}/{answer} at {concurrency}: {numbers}", flush=True)


def ask(
    server: Server, options: argparse.Namespace, prompt: int, answer: int, concurrency: int, seed: int, log: Path
) -> dict[str, Any]:
    """What the client says of one point. Raises RuntimeError when it fails, or a request does."""
    requests = options.rounds * concurrency
    result = log.with_suffix(".jsonl")
    result.unlink(missing_ok=True)
    command = [*CLIENT, "--backend=sglang", f"--base-url={server.url}"]
    command += [f"--model={options.model_path}", "--dataset-name=random-ids", "--tokenize-prompt"]
    command += [f"--random-input-len={prompt}", f"--random-output-len={answer}", "--random-range-ratio=1.0"]
    command += [f"--num-prompts={requests}", f"--max-concurrency={concurrency}", f"--seed={seed}"]
    command += ["--flush-cache", f"--warmup-requests={concurrency}", f"--output-file={result}"]
    with log.open("ab") as file:
        bar = None if sys.stderr.isatty() else file  # the client's own progress bar
        try:
            done = subprocess.run(command, stdout=file, stderr=bar, timeout=options.point_seconds, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no result after {options.point_seconds} s, see {log}") from None
    if done.returncode or not result.exists():
        raise RuntimeError(f"sglang.bench_serving ended with code {done.returncode}, see {log}")
    content = json.loads(result.read_text().splitlines()[-1])
    result.unlink()
    if content["completed"] != requests:
        raise RuntimeError(f"{content['completed']} of {requests} requests were answered, see {log}")
    return content


def cells(row: dict[str, Any]) -> list[str]:
    return [f"{row[key]:.0f}" if row[key] >= 1000 else f"{row[key]:.1f}" for key, _, _ in METRICS]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Every point, an arm a line; how many times the first arm's tokens per second the others' are."""
    groups: dict[str, list[Line]] = {}
    first: dict[str, float] = {}
    for row in rows:
        point = f"{row['prompt']}/{row['answer']} tokens at concurrency {row['concurrency']}"
        base = first.setdefault(point, row["tokens_per_s"])
        groups.setdefault(point, []).append(Line(row["arm"], [*cells(row), f"{row['tokens_per_s'] / base:.3f}"]))
    print_table(console(), [*(title for _, _, title in METRICS), "x first arm"], list(groups.items()))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A row of panels per shape, a panel per metric over concurrency, a line per arm."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((r["prompt"], r["answer"]) for r in rows))
    size = (3.6 * len(METRICS), 0.8 + 3.0 * len(shapes))
    figure, axes = pyplot.subplots(len(shapes), len(METRICS), figsize=size, layout="constrained", squeeze=False)
    titles = ("median TTFT, ms", "p99 TTFT, ms", "median TPOT, ms", "p99 TPOT, ms", "output tokens/s")
    for places, (prompt, answer) in zip(axes, shapes, strict=True):
        for place, (key, _, _), title in zip(places, METRICS, titles, strict=True):
            for arm in dict.fromkeys(r["arm"] for r in rows):
                mine = [r for r in rows if (r["arm"], r["prompt"], r["answer"]) == (arm, prompt, answer)]
                labels = [str(r["concurrency"]) for r in mine]
                place.plot(labels, [r[key] for r in mine], marker="o", label=arm)
            place.set_title(f"{title}, {prompt}/{answer}", fontsize=9)
            place.set_xlabel("concurrency", fontsize=8)
            place.set_ylim(bottom=0)
            place.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, dpi=90, format="png")
    pyplot.close(figure)
    write(path, content.getvalue(), force=True)
