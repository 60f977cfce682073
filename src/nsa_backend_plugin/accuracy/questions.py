"""GSM8K data and the few-shot completion form of SGLang's `run_eval` (the first k lines are the shots)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Where a completion ends: the same words as `sglang.test.run_eval --api completion`.
STOPS = ("Question", "Assistant:", "<|separator|>")
_NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass(frozen=True)
class Item:
    """One question: `key` names it across runs, `prompt` is what is sent, `expected` the right number."""

    key: str
    prompt: str
    expected: float


def last_number(text: str) -> float | None:
    """The last number of a text, thousands separators removed: the form's answer. None when there is none."""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def load_items(path: Path, shots: int, count: int | None) -> list[Item]:
    """Questions of a GSM8K JSONL file behind its first `shots` rows, which become every prompt's worked examples.

    Rows hold "question" and "answer"; an optional "context" replaces the shots (long-recall questions).
    Raises ValueError that names the file and line for a malformed row, and FileNotFoundError.
    """
    if count is not None and count < 1:
        raise ValueError(f"--num-examples {count}: expected at least 1")
    rows = [checked(path, number, row) for number, row in read_rows(path)]
    if not 0 <= shots < len(rows):
        raise ValueError(f"--num-shots {shots}: {path} has {len(rows)} rows, expected more rows than shots")
    prefix = "".join(f"{_question(row)} {row['answer']}\n\n" for row in rows[:shots])
    items = []
    for index, row in enumerate(rows[shots:], shots):
        expected = last_number(row["answer"])
        if expected is None:
            raise ValueError(f"{path}: the answer of row {index + 1} has no number: {row['answer']!r}")
        items.append(Item(f"{path.name}:{index + 1}", row.get("context", prefix) + _question(row), expected))
    return items[:count]


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line of a JSONL file that is not blank; ValueError names a malformed one."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028, which JSON may hold
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected an object, got {line[:80]}")
        yield number, row


def checked(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    """The row. Raises ValueError that names the line when a field of GSM8K's is missing or is not text."""
    if not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise ValueError(f'{path}:{number}: expected an object with "question" and "answer" strings, got {row}')
    if not isinstance(row.get("context", ""), str):
        raise ValueError(f'{path}:{number}: "context": expected a string, got {row["context"]!r}')
    return row


def _question(row: dict[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer:"
