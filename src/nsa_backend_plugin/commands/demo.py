"""Serve the tiny DSA model through nsa_plugin, ask it questions, check every answer.

Starts `python -m sglang.launch_server --attention-backend nsa_plugin`, asks held-out word problems and one
long-context recall question over HTTP, prints what was answered, how fast, and which kernel every operation uses.
Exit code 0 only if every answer is right.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_backend_plugin.commands import _checkout

_MAX_NEW_TOKENS = 70
#: An empty list of devices keeps the CPU demo on the CPU where torch sees a GPU.
_CPU_ENV = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Question:
    """kind: "problem" or "recall". prompt: what is sent. answer: the number after `####` that is right."""

    kind: str
    question: str
    prompt: str
    answer: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", type=Path, help="default: the clone's examples/models/tiny-dsa")
    parser.add_argument("--questions", type=Path, help="default: the clone's examples/demo/problems.jsonl")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--port", type=int, default=None, help="default: a free one")
    parser.add_argument("--log", type=Path, default=Path(".demo") / "server.log", help="the server's output")
    parser.add_argument("--serve", action="store_true", help="leave the server up until Ctrl-C")
    parser.add_argument("server_args", nargs="*", metavar="-- ARG", help="more arguments for the server")


def run(options: argparse.Namespace) -> int:
    from nsa_backend_plugin import BACKEND_NAME
    from nsa_backend_plugin.serving import CPU_ARGS, Server, ServerError

    on_cpu = options.device == "cpu"
    args = [*(CPU_ARGS if on_cpu else (f"--attention-backend={BACKEND_NAME}",)), *options.server_args]
    env = _CPU_ENV if on_cpu else None
    try:
        model, questions = _inputs(options)
        server = Server(model, args, env=env, port=options.port, log_path=options.log)
    except (ValueError, OSError) as error:
        print(f"nsa-plugin demo: {error}", file=sys.stderr)
        return 2
    print(shlex.join(["python", *server.command[1:]]), flush=True)
    try:
        with waiting("starting the server"):
            server.start()
        try:
            right = ask_all(server, questions)
            print_kernels(server.log_path)
            if options.serve:
                serve(server, questions[0])
        finally:
            server.stop()
    except ServerError as error:
        print(f"nsa-plugin demo: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # requests' errors are OSErrors: the server died while it was asked
        print(f"nsa-plugin demo: {error}; the server's log is {server.log_path}", file=sys.stderr)
        return 1
    return 0 if right == len(questions) else 1


def _inputs(options: argparse.Namespace) -> tuple[Path, list[Question]]:
    """The model and the questions, by default the clone's. Raises OSError for what is not there, ValueError for a file
    that does not hold questions."""
    try:
        model = options.model_path or _checkout.find("examples") / "models" / "tiny-dsa"
        path = options.questions or _checkout.find("examples") / "demo" / "problems.jsonl"
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or pass --model-path and --questions") from None
    for option, given in (("--model-path", model), ("--questions", path)):
        if not given.exists():
            raise FileNotFoundError(f"{given} does not exist: pass {option}")
    return model, load_questions(path)


def load_questions(path: Path) -> list[Question]:
    """Questions of a JSONL file: rows with role "shot" are worked examples that go before every other row, unless that
    brings a context of its own. Every other field is GSM8K's. Raises ValueError for any other file."""
    from nsa_backend_plugin.accuracy.questions import checked, read_rows

    rows = [checked(path, number, row) for number, row in read_rows(path)]
    shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in rows if r.get("role") == "shot")
    questions = []
    for row in rows:
        answer = final_answer(row["answer"])
        if answer is None:
            raise ValueError(f"{path}: expected a number behind #### in every answer, got {row['answer']!r}")
        if row.get("role") != "shot":
            prompt = f"{row.get('context', shots)}Question: {row['question']}\nAnswer:"
            questions.append(Question(row.get("role", "problem"), row["question"], prompt, answer))
    if not questions:
        raise ValueError(f"{path}: expected at least one question")
    return questions


def final_answer(text: str) -> str | None:
    """The number after the first `####`."""
    found = re.search(r"####\s*(-?\d+)", text)
    return found.group(1) if found else None


def request_body(question: Question) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": _MAX_NEW_TOKENS, "stop": ["Question"]}
    return {"text": question.prompt, "sampling_params": sampling}


def ask_all(server: Any, questions: list[Question]) -> int:
    """Ask one after the other; print question, answer, verdict and speed. Returns how many were right."""
    right = 0
    for question in questions:
        start = time.monotonic()
        reply = server.post("/generate", request_body(question))
        seconds = time.monotonic() - start
        given = final_answer(reply["text"])
        verdict = "right" if given == question.answer else f"WRONG, expected {question.answer}"
        right += given == question.answer
        meta = reply["meta_info"]
        print(f"\n[{question.kind}, {meta['prompt_tokens']} tokens of prompt] {question.question}")
        for line in reply["text"].strip().splitlines():
            print(f"    {line}")
        print(f"    -> {given}: {verdict}  ({meta['completion_tokens'] / seconds:.1f} tokens/s)", flush=True)
    print(f"\n{right} of {len(questions)} answers right")
    return right


def print_kernels(log_path: Path) -> None:
    """An implementation's first use is a line of the log; show the running server's own."""
    from nsa_backend_plugin.arms import kernel_lines

    print("\nkernels in use:")
    for line in kernel_lines(log_path):
        print(f"    {line}")


def serve(server: Any, question: Question) -> None:
    """Print a request to try and wait for Ctrl-C or for the server's end."""
    body = shlex.quote(json.dumps(request_body(question)))
    print(f"\nserver log: {server.log_path}\nserving on {server.url} until Ctrl-C; try:\n")
    print(f"curl -s {server.url}/generate -H 'Content-Type: application/json' -d {body}\n", flush=True)
    try:
        while server.running():
            time.sleep(0.5)
    except KeyboardInterrupt:
        print("stopped")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show elapsed seconds in place on a terminal, one line elsewhere."""
    done, start = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(0.5):
            print(f"\r\033[K{what}  {time.monotonic() - start:.0f} s", end="", flush=True)

    ticker = threading.Thread(target=tick, daemon=True)
    if sys.stdout.isatty():
        ticker.start()
    try:
        yield
    finally:
        done.set()
        if ticker.is_alive():
            ticker.join()
            print("\r\033[K", end="")
        print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)
