"""Held-out problems of the tiny DSA model as data files of `nsa-plugin gsm8k`."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from tests.engine.conftest import ROOT

sys.path.append(str(ROOT / "examples" / "tiny_dsa"))
import data
from tokenizer import Encoder

MODEL = ROOT / "examples" / "models" / "tiny-dsa"
encode = Encoder()


def write_arithmetic(path: Path, prefixes: int, per_prefix: int, shots: int, seed: int) -> None:
    """`prefixes` times `per_prefix` held-out problems; those of a prefix share its worked examples from training.

    They stand `prefixes` rows apart: a server that is asked in order at a lower concurrency finds them in its cache.
    """
    rng = random.Random(seed)
    rows = []
    for _ in range(prefixes):
        examples = [data.word_problem(rng, test=False) for _ in range(shots)]
        context = "".join(example.prompt + example.completion for example in examples)
        rows += [(context, data.word_problem(rng, test=True)) for _ in range(per_prefix)]
    _write(path, [row for first in range(per_prefix) for row in rows[first::per_prefix]])


def write_recall(path: Path, count: int, tokens: int, seed: int) -> None:
    """`count` questions for a memo at the start of a prompt of about `tokens` tokens."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, problem = data.test_prompt(rng, data.RECALL, tokens, encode)
        rows.append((prompt.removesuffix(problem.prompt), problem))
    _write(path, rows)


def write_long(path: Path, kind: str, count: int, tokens: tuple[int, int], seed: int) -> None:
    """`count` prompts of one kind ("arithmetic" or `data.RECALL`) with a random length between the two."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, problem = data.test_prompt(rng, kind, rng.randint(*tokens), encode)
        rows.append((prompt.removesuffix(problem.prompt), problem))
    _write(path, rows)


def _write(path: Path, rows: list[tuple[str, data.Problem]]) -> None:
    lines = [json.dumps({"context": c, "question": p.question, "answer": p.answer}) for c, p in rows]
    path.write_text("\n".join(lines) + "\n")
