"""GSM8K accuracy through the real server, and whether two arms differ by more than chance.

Every arm is one server on the same model and questions: a backend, with variables and arguments of its own. Finished
answers are kept in --out; the same command resumes there. Exit code 0: no two arms differ by more than chance
(McNemar's test, 95%) and none falls below --min-accuracy; 1: some do; 2: the run could not be finished.

    nsa-plugin gsm8k --model-path M --data-path test.jsonl --arms nsa_plugin,dsa -- --tp 8 --kv-cache-dtype fp8_e4m3
    nsa-plugin gsm8k --base-url http://127.0.0.1:30000 --data-path test.jsonl
    nsa-plugin gsm8k --model-path M --data-path T --arms nsa_plugin "nsa_plugin NSA_PLUGIN_SPARSE_MLA_IMPL=torch"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_backend_plugin.accuracy.runs import Plan


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
        "--sgl-eval-data", type=Path, help='also sgl-eval\'s chat form, on JSONL with "problem" and "expected_answer"'
    )
    parser.add_argument("server_args", nargs="*", metavar="-- ARG", help="arguments of every arm's server")


def run(options: argparse.Namespace) -> int:
    from nsa_backend_plugin.accuracy import report
    from nsa_backend_plugin.accuracy.ask import AskError
    from nsa_backend_plugin.accuracy.runs import run_arm
    from nsa_backend_plugin.arms import parse_arms
    from nsa_backend_plugin.files import write_json
    from nsa_backend_plugin.serving import ServerError

    try:
        arms = parse_arms(options.arms)
        if options.base_url and len(arms) > 1:
            raise ValueError(f"--base-url serves one arm: got --arms {options.arms}")
        plan = _plan(options)
        runs = [run_arm(arm, plan) for arm in arms]
        result = report.build(runs, ["nsa-plugin", *sys.argv[1:]], _data(options, plan))
        print(report.table(result))
        path = options.out / "report.json"
        write_json(path, result)
        print(f"report: {path}")
    except (ValueError, OSError, ServerError, AskError) as error:
        print(f"nsa-plugin gsm8k: {error}", file=sys.stderr)
        return 2
    reasons = report.failures(result, options.min_accuracy)
    for reason in reasons:
        print(f"FAILED: {reason}")
    return int(bool(reasons))


def _plan(options: argparse.Namespace) -> Plan:
    from nsa_backend_plugin.accuracy import sgl_eval
    from nsa_backend_plugin.accuracy.questions import load_items
    from nsa_backend_plugin.accuracy.runs import Plan

    for name in ("concurrency", "max_tokens", "timeout", "start_timeout"):
        if not getattr(options, name) > 0:  # nan is not either
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected more than 0")
    if not 0 <= options.min_accuracy <= 1:
        raise ValueError(f"--min-accuracy {options.min_accuracy}: expected a share, 0 to 1")
    items = load_items(options.data_path, options.num_shots, options.num_examples)
    chat = []
    if options.sgl_eval_data:
        sgl_eval.program()  # say that it is missing before a server starts
        chat = sgl_eval.load_questions(options.sgl_eval_data, options.num_examples)
    model = options.model_path
    return Plan(
        items=items,
        chat=chat,
        model_path=str(Path(model).resolve()) if model and Path(model).is_dir() else model,
        base_url=options.base_url and options.base_url.rstrip("/").removesuffix("/v1"),
        server_args=options.server_args,
        out=options.out,
        concurrency=options.concurrency,
        max_tokens=options.max_tokens,
        timeout=options.timeout,
        start_timeout=options.start_timeout,
    )


def _data(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What the questions were, to compare with what somebody else has."""
    import hashlib

    found = {"path": str(options.data_path), "sha256": hashlib.sha256(options.data_path.read_bytes()).hexdigest()}
    return {
        **found,
        "shots": options.num_shots,
        "questions": len(plan.items),
        "sgl_eval_path": options.sgl_eval_data and str(options.sgl_eval_data),
        "sgl_eval_questions": len(plan.chat),
    }
