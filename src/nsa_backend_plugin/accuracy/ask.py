"""Ask a server every question at a given concurrency; each finished answer is kept at once, a rerun resumes."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import requests

from nsa_backend_plugin.accuracy.questions import STOPS, Item, last_number
from nsa_backend_plugin.files import naming


class AskError(RuntimeError):
    """A request failed; the finished answers are in the file and a rerun continues behind them."""


@dataclass(frozen=True)
class Answer:
    """One finished answer. logprobs: of the generated tokens, natural log. seconds: of the request."""

    key: str
    prompt_hash: str
    text: str
    predicted: float | None
    correct: bool
    tokens: list[int]
    logprobs: list[float]
    prompt_tokens: int
    seconds: float


def prompt_hash(item: Item) -> str:
    return hashlib.sha256(item.prompt.encode()).hexdigest()[:16]


def load_answers(path: Path, items: list[Item]) -> dict[str, Answer]:
    """Finished answers of a results file that belong to these very prompts. A torn last line is left out."""
    if not path.exists():
        return {}
    wanted = {(item.key, prompt_hash(item)): item for item in items}
    answers = {}
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            answer = Answer(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: not a finished answer ({error}); delete the file to start over"
            ) from None
        item = wanted.get((answer.key, answer.prompt_hash))
        if item is not None:
            answers[answer.key] = replace(answer, correct=answer.predicted == item.expected)
    return answers


def _cut_torn_line(path: Path) -> None:
    """What is appended next must begin a line."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class ProgressBar:
    """tqdm where it is installed (SGLang brings it), silence elsewhere."""

    def __init__(self, total: int, done: int, label: str):
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=total, initial=done, desc=label, unit="q")

    def step(self, correct: int, finished: int) -> None:
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"{correct}/{finished} right")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def answer_all(
    base_url: str, items: list[Item], path: Path, *, label: str, concurrency: int, max_tokens: int, timeout: float
) -> tuple[list[Answer], float]:
    """Answers in the order of the items, and generated tokens per second of what was asked now (0 if nothing).

    Raises AskError when a request fails or takes longer than `timeout` seconds.
    """
    answers = load_answers(path, items)
    todo = [item for item in items if item.key not in answers]
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(path)
    bar = ProgressBar(len(items), len(answers), label)
    start, generated = time.monotonic(), 0
    failure: AskError | None = None
    with naming(path), path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(concurrency) as pool:
        pending: set[Future[Answer]] = {pool.submit(_ask, base_url, i, max_tokens, timeout) for i in todo}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    if future.cancelled():
                        continue
                    try:
                        answer = future.result()
                    except AskError as error:  # ask nothing new, keep what is under way
                        failure = failure or error
                        for other in pending:
                            other.cancel()
                        continue
                    file.write(json.dumps(asdict(answer)) + "\n")
                    file.flush()
                    answers[answer.key] = answer
                    generated += len(answer.tokens)
                    bar.step(sum(a.correct for a in answers.values()), len(answers))
        finally:
            for future in pending:
                future.cancel()
            bar.close()
    if failure is not None:
        raise AskError(f"{label}: {failure} ({len(answers)} of {len(items)} answers are kept in {path})")
    rate = generated / (time.monotonic() - start) if todo else 0.0
    return [answers[item.key] for item in items], rate


def _ask(base_url: str, item: Item, max_tokens: int, timeout: float) -> Answer:
    body: dict[str, Any] = {
        "text": item.prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": max_tokens, "stop": list(STOPS)},
        "return_logprob": True,
    }
    start = time.monotonic()
    try:
        reply = requests.post(f"{base_url}/generate", json=body, timeout=timeout)
        reply.raise_for_status()
        result = reply.json()
    except requests.Timeout:
        raise AskError(f"no answer to {item.key} within {timeout:g} s") from None
    except requests.HTTPError:
        raise AskError(f"{item.key} was refused: {reply.status_code} {reply.text[:300]}") from None
    except requests.JSONDecodeError as error:
        raise AskError(f"the answer to {item.key} is not JSON: {error}") from None
    except requests.RequestException as error:
        raise AskError(f"the server at {base_url} does not answer: {error!r}") from None
    if not isinstance(result, dict) or "output_token_logprobs" not in result.get("meta_info", {}):
        raise AskError(f"the answer to {item.key} is not that of SGLang's /generate: {str(result)[:300]}")
    pairs = result["meta_info"]["output_token_logprobs"]
    predicted = last_number(result["text"])
    return Answer(
        key=item.key,
        prompt_hash=prompt_hash(item),
        text=result["text"],
        predicted=predicted,
        correct=predicted == item.expected,
        tokens=[int(p[1]) for p in pairs],
        logprobs=[float(p[0]) for p in pairs],
        prompt_tokens=int(result["meta_info"]["prompt_tokens"]),
        seconds=round(time.monotonic() - start, 3),
    )
