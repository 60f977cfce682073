"""GSM8K data and the few-shot completion form of SGLang's `run_eval` (the first k lines are the shots)."""

from __future__ import annotations

import json
import re
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
    rows = [_row(path, n, line) for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not 0 <= shots < len(rows):
        raise ValueError(f"--num-shots {shots}: expected 0 to {len(rows) - 1}, because {path} has {len(rows)} rows")
    prefix = "".join(f"{_question(row)} {row['answer']}\n\n" for row in rows[:shots])
    items = []
    for index, row in enumerate(rows[shots:], shots):
        expected = last_number(row["answer"])
        if expected is None:
            raise ValueError(f"{path}: the answer of row {index + 1} has no number: {row['answer']!r}")
        items.append(Item(f"{path.name}:{index + 1}", row.get("context", prefix) + _question(row), expected))
    return items[:count]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("question", "answer")):
        raise ValueError(f'{path}:{number}: expected an object with "question" and "answer" strings, got {line[:80]}')
    return row


def _question(row: dict[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer:"
