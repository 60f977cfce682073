"""GSM8K accuracy through the real server, and whether two arms differ by more than chance.

Every arm is one server on the same model and questions: a backend, with variables and arguments of its own. Finished
answers are kept in --out; the same command resumes there. Exit code 0: no arm differs from the first one by more than
chance (McNemar's test, 95%) or falls below --min-accuracy; 1: one does; 2: the run could not be finished.

    nsa-plugin gsm8k --model-path M --data-path test.jsonl --arms nsa_plugin,dsa -- --tp 8 --kv-cache-dtype fp8_e4m3
    nsa-plugin gsm8k --base-url http://127.0.0.1:30000 --data-path test.jsonl
    nsa-plugin gsm8k --model-path M --data-path T --arms nsa_plugin "nsa_plugin NSA_PLUGIN_SPARSE_MLA_IMPL=torch"
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_backend_plugin.accuracy.arms import Arm
    from nsa_backend_plugin.accuracy.ask import Answer
    from nsa_backend_plugin.accuracy.questions import Item


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model-path", help="start a server per arm on this model")
    where.add_argument("--base-url", help="ask a server that is up already (one arm)")
    parser.add_argument("--data-path", type=Path, required=True, help='JSONL with "question" and "answer"')
    parser.add_argument(
        "--arms", nargs="+", default=["nsa_plugin"], help='BACKEND or "BACKEND NAME=VALUE --flag=value"'
    )
    parser.add_argument("--num-shots", type=int, default=5, help="rows of the data that become worked examples")
    parser.add_argument("--num-examples", type=int, help="default: all")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one answer")
    parser.add_argument("--start-timeout", type=float, default=1800.0, help="seconds for a server to be healthy")
    parser.add_argument("--min-accuracy", type=float, default=0.0, help="fail when an arm is below (0 to 1)")
    parser.add_argument("--out", type=Path, default=Path("gsm8k-results"))
    parser.add_argument(
        "--sgl-eval-data", type=Path, help='also run sgl-eval\'s chat form per arm, on JSONL with "problem"'
    )
    parser.add_argument("server_args", nargs="*", metavar="-- ARG", help="arguments of every arm's server")


def run(options: argparse.Namespace) -> int:
    from nsa_backend_plugin.accuracy.arms import parse_arms
    from nsa_backend_plugin.accuracy.ask import AskError
    from nsa_backend_plugin.accuracy.questions import load_items
    from nsa_backend_plugin.serving import ServerError

    try:
        arms = parse_arms(options.arms)
        if options.base_url and len(arms) > 1:
            raise ValueError(f"--base-url serves one arm: got --arms {options.arms}")
        items = load_items(options.data_path, options.num_shots, options.num_examples)
        runs = [_run_arm(arm, items, options) for arm in arms]
    except (ValueError, OSError, ServerError, AskError) as error:
        print(f"nsa-plugin gsm8k: {error}", file=sys.stderr)
        return 2
    return _report(runs, options)


def _run_arm(arm: Arm, items: list[Item], options: argparse.Namespace) -> dict[str, Any]:
    from nsa_backend_plugin.accuracy.arms import kernel_lines
    from nsa_backend_plugin.accuracy.ask import AskError, answer_all
    from nsa_backend_plugin.serving import Server

    folder = options.out / arm.file_name
    result: dict[str, Any] = {"arm": arm.text, "kernels": [], "command": None}

    def ask(base_url: str) -> None:
        result["answers"], result["tokens_per_second"] = answer_all(
            base_url,
            items,
            folder / "answers.jsonl",
            label=arm.text,
            concurrency=options.concurrency,
            max_tokens=options.max_tokens,
            timeout=options.timeout,
        )
        if options.sgl_eval_data:
            result["sgl_eval"] = _sgl_eval(base_url, folder, options)

    if options.base_url:
        ask(options.base_url.rstrip("/"))
        return result
    args = [f"--attention-backend={arm.backend}", *options.server_args, *arm.args]
    log = folder / "server.log"
    with Server(options.model_path, args, env=arm.env, log_path=log, timeout=options.start_timeout) as server:
        try:
            ask(server.url)
        except AskError as error:
            state = "is still running" if server.running() else f"has died; end of {log}:\n{server.log_tail(15)}"
            raise AskError(f"{error}; the server {state}") from None
    result["kernels"] = kernel_lines(log)
    result["command"] = server.command
    return result


def _sgl_eval(base_url: str, folder: Path, options: argparse.Namespace) -> str:
    """Run sgl-eval as its users do; returns what it printed last. Raises ValueError when it fails."""
    import subprocess

    command = ["sgl-eval", "run", "gsm8k", "--base-url", f"{base_url}/v1", "--from-dataset"]
    command += [str(options.sgl_eval_data), "--out-dir", str(folder), "--temperature", "0"]
    command += ["--max-tokens", str(options.max_tokens)]
    command += ["--num-threads", str(options.concurrency)]
    if options.num_examples:
        command += ["--num-examples", str(options.num_examples)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed with code {done.returncode}: {done.stderr[-500:]}")
    return done.stdout[-2000:]


def _report(runs: list[dict[str, Any]], options: argparse.Namespace) -> int:
    from nsa_backend_plugin import __version__
    from nsa_backend_plugin.accuracy.compare import accuracy, compare

    failed = False
    report: dict[str, Any] = {"plugin": __version__, "command": sys.argv, "data": str(options.data_path), "arms": []}
    first: list[Answer] = runs[0]["answers"]
    print(
        f"\n{'arm':40} {'accuracy':>9} {'95% interval':>16} {'tok/s':>8} {'agree':>7} {'McNemar p':>10} {'dlogprob':>9}"
    )
    for number, one in enumerate(runs):
        answers: list[Answer] = one.pop("answers")
        score = accuracy([a.correct for a in answers])
        failed = failed or score.value < options.min_accuracy
        line = f"{one['arm'][:40]:40} {score.value:9.4f} {f'{score.low:.4f}-{score.high:.4f}':>16}"
        line += f" {one['tokens_per_second']:8.1f}"
        entry = {**one, "accuracy": asdict(score), "prompt_tokens": sum(a.prompt_tokens for a in answers)}
        if number:
            versus = compare(first, answers)
            failed = failed or versus.differs
            gap = "-" if versus.logprob_difference is None else f"{versus.logprob_difference:.5f}"
            line += f" {versus.agreement:7.4f} {versus.p_value:10.4f} {gap:>9}"
            entry["versus_first"] = {**asdict(versus), "differs": versus.differs}
        report["arms"].append(entry)
        print(line)
    for entry in report["arms"][1:]:
        verdict = (
            "differ by more than chance" if entry["versus_first"]["differs"] else "do not differ by more than chance"
        )
        print(f"{report['arms'][0]['arm']} and {entry['arm']} {verdict}")
    path = options.out / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"report: {path}")
    return int(failed)
