"""One arm's run: start its server or use one that is up, ask everything, keep what is needed to resume and repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from nsa_backend_plugin import environment
from nsa_backend_plugin.accuracy import sgl_eval
from nsa_backend_plugin.accuracy.ask import Answer, AskError, answer_all, load_answers
from nsa_backend_plugin.accuracy.questions import Item
from nsa_backend_plugin.arms import Arm, kernel_lines
from nsa_backend_plugin.files import write_json
from nsa_backend_plugin.serving import Server, server_facts


@dataclass(frozen=True)
class Plan:
    """What every arm is asked, and how. Exactly one of model_path and base_url is given. chat: sgl-eval's questions.

    model_path: absolute for a folder, so that a rerun from elsewhere is known to be of the same model."""

    items: list[Item]
    chat: list[dict[str, Any]]
    model_path: str | None
    base_url: str | None
    server_args: list[str]
    out: Path
    concurrency: int
    max_tokens: int
    timeout: float
    start_timeout: float


@dataclass
class Run:
    """A finished arm. facts: kernels, the server's command and arguments, device, tokens per second."""

    arm: Arm
    answers: list[Answer]
    chat: list[sgl_eval.ChatAnswer] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def run_arm(arm: Arm, plan: Plan) -> Run:
    """Run an arm, or take it as it is when an earlier run has finished it.

    Raises AskError, ServerError, and ValueError when OUT holds the answers of another model, arm or limit.
    """
    folder = plan.out / arm.file_name
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder / "settings.json", arm, plan)
    finished = _finished(folder, arm, plan)
    if finished is not None:
        print(f"{arm.text}: every answer is in {folder} already")
        return finished
    base_url = plan.base_url
    if base_url is not None:
        run = _ask(arm, plan, base_url, folder, lambda: _healthy(base_url))
        run.facts["device"] = run.facts["server"].get("device")  # the server may be on another machine
    else:
        run = _serve(arm, plan, folder)
    write_json(folder / "facts.json", run.facts)
    return run


def _claim(path: Path, arm: Arm, plan: Plan) -> None:
    """Answers of different models, arguments or limits must not meet in one file."""
    settings: dict[str, Any] = {"model_path": plan.model_path, "arm": arm.text, "max_tokens": plan.max_tokens}
    settings["server_args"] = plan.server_args
    if plan.base_url is not None:
        served = server_facts(plan.base_url)
        settings |= {name: served[name] for name in ("model_path", "attention_backend") if name in served}
    asked = (path.parent / "answers.jsonl", path.parent / "sgl_eval")
    if not path.exists() or not any(found.exists() for found in asked):
        write_json(path, settings)
        return
    earlier = json.loads(path.read_text())
    different = [
        f"{name} {earlier[name]!r}, now {value!r}"
        for name, value in settings.items()
        if name in earlier and earlier[name] != value
    ]
    if different:
        raise ValueError(
            f"--out: {path.parent} holds the answers of another run ({'; '.join(different)}); choose another --out or "
            "delete the folder"
        )


def _finished(folder: Path, arm: Arm, plan: Plan) -> Run | None:
    facts = folder / "facts.json"
    if not facts.exists():
        return None
    answers = load_answers(folder / "answers.jsonl", plan.items)
    chat = sgl_eval.load_answers(folder / "sgl_eval", plan.chat)
    if len(answers) < len(plan.items) or len(chat) < len(plan.chat):
        return None
    return Run(
        arm,
        [answers[item.key] for item in plan.items],
        [chat[row["id"]] for row in plan.chat],
        json.loads(facts.read_text()),
    )


def _serve(arm: Arm, plan: Plan, folder: Path) -> Run:
    args = [f"--attention-backend={arm.backend}", *plan.server_args, *arm.args]
    log = folder / "server.log"
    assert plan.model_path is not None
    with Server(plan.model_path, args, env=arm.env, log_path=log, timeout=plan.start_timeout) as server:
        try:
            run = _ask(arm, plan, server.url, folder, server.running)
        except AskError as error:
            state = "is still running" if server.running() else f"has died; end of {log}:\n{server.log_tail(15)}"
            raise AskError(f"{error}; the server {state}") from None
    run.facts |= {"kernels": kernel_lines(log), "command": server.command, "env": arm.env}
    run.facts["device"] = environment.device(run.facts["server"].get("device"))
    return run


def _ask(arm: Arm, plan: Plan, base_url: str, folder: Path, alive: Callable[[], bool]) -> Run:
    answers, rate = answer_all(
        base_url,
        plan.items,
        folder / "answers.jsonl",
        label=arm.text,
        concurrency=plan.concurrency,
        max_tokens=plan.max_tokens,
        timeout=plan.timeout,
    )
    chat = sgl_eval.answer_all(
        base_url,
        plan.chat,
        folder / "sgl_eval",
        concurrency=plan.concurrency,
        max_tokens=plan.max_tokens,
        alive=alive,
    )
    facts: dict[str, Any] = {
        "server": server_facts(base_url),
        "kernels": [],
        "command": None,
        "tokens_per_second": rate,
    }
    return Run(arm, answers, chat, facts)


def _healthy(base_url: str) -> bool:
    try:
        return requests.get(f"{base_url}/health", timeout=30).ok
    except requests.RequestException:
        return False
