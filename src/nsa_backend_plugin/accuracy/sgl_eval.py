"""sgl-eval's chat form of GSM8K (zero-shot, boxed answer), run by sgl-eval itself; finished answers are kept."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_backend_plugin.accuracy.ask import AskError
from nsa_backend_plugin.accuracy.questions import read_rows
from nsa_backend_plugin.files import naming
from nsa_backend_plugin.serving import Child

_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class ChatAnswer:
    """predicted: the boxed answer as text. truncated: --max-tokens ended it."""

    key: str
    predicted: str | None
    correct: bool
    truncated: bool


def program() -> str:
    """Path of the sgl-eval command. Raises ValueError when it is not installed."""
    found = shutil.which("sgl-eval") or shutil.which("sgl-eval", path=str(Path(sys.executable).parent))
    if found is None:
        raise ValueError(
            "--sgl-eval-data: the program sgl-eval is not on PATH: python -m pip install sgl-eval, in an "
            "environment of its own"
        )
    return found


def load_questions(path: Path, count: int | None) -> list[dict[str, Any]]:
    """Rows of a JSONL file with "problem" and "expected_answer", each with an "id" that changes with its content.

    Raises ValueError that names the file and line for a malformed row, and FileNotFoundError.
    """
    rows = []
    for number, row in read_rows(path):
        if not isinstance(row.get("problem"), str) or "expected_answer" not in row:
            raise ValueError(f'{path}:{number}: expected an object with "problem" and "expected_answer"')
        digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
        rows.append({**row, "id": f"{path.name}:{number}:{digest}"})
    if not rows:
        raise ValueError(f"{path}: expected at least one question")
    return rows[:count]


def load_answers(folder: Path, rows: list[dict[str, Any]]) -> dict[str, ChatAnswer]:
    """What sgl-eval has answered in any of its runs below `folder`; requests that failed are left out."""
    wanted, answers = {row["id"] for row in rows}, {}
    for file in sorted(folder.glob("*/output-rs*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n"):  # an answer may hold U+2028, which is no end of line
            try:
                found = json.loads(line)
            except json.JSONDecodeError:  # killed while writing
                continue
            if found["id"] in wanted and found["finish_reason"] in ("stop", "length"):
                answers[found["id"]] = ChatAnswer(
                    key=found["id"],
                    predicted=found["predicted_answer"],
                    correct=bool(found["symbolic_correct"]),
                    truncated=found["finish_reason"] == "length",
                )
    return answers


def answer_all(
    base_url: str,
    rows: list[dict[str, Any]],
    folder: Path,
    *,
    concurrency: int,
    max_tokens: int,
    alive: Callable[[], bool],
) -> list[ChatAnswer]:
    """Answers in the order of the rows; asks what `folder` has no answer to. sgl-eval prints its own progress.

    Raises AskError when a question stays without an answer. `alive` says whether the server still runs: sgl-eval
    would retry for a long time.
    """
    answers = load_answers(folder, rows)
    missing = [row for row in rows if row["id"] not in answers]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        questions = folder / "questions.jsonl"
        with naming(questions):
            questions.write_text("".join(json.dumps(row) + "\n" for row in missing), encoding="utf-8")
        command = [program(), "run", "gsm8k", "--base-url", f"{base_url}/v1", "--from-dataset", str(questions)]
        command += ["--out-dir", str(folder), "--temperature", "0", "--max-tokens", str(max_tokens)]
        command += ["--num-threads", str(concurrency)]
        code = _run(command, alive)
        answers = load_answers(folder, rows)
        if len(answers) < len(rows):
            ended = "stopped, the server is gone" if code is None else f"exit code {code}"
            raise AskError(
                f"sgl-eval ({ended}) left {len(rows) - len(answers)} of {len(rows)} questions without an answer; the "
                f"others are kept in {folder}"
            )
    return [answers[row["id"]] for row in rows]


def _run(command: list[str], alive: Callable[[], bool]) -> int | None:
    with Child(command, stop_signal=signal.SIGINT) as child:  # at SIGINT it writes what it has
        while (code := child.wait(_POLL_SECONDS)) is None and alive():
            pass
        return code
