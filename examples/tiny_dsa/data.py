"""Synthetic word problems in GSM8K's format, and long-range recall.

Arithmetic: a question with two distractors, a chain of thought with GSM8K's `<<a+b=c>>` marks, `#### answer`.
Recall: a block of memos (name and three-digit code) early in the text, a question about one of them much later;
a window of recent tokens cannot answer it.

Training and test problems are disjoint by construction: the operands (a, b) of every operation, and the
(name, code) of every memo, belong to exactly one of the two sides, decided by `is_test_pair` / `is_test_memo`.
Test problems have no difference below ten: 35 - 8, held out, can be learnt from 25 - 8 and 45 - 8, but 15 - 8 from
nothing, and the problems are to test attention, not arithmetic.
Everything is a function of the `random.Random` passed in.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NAMES = "Tom Mia Ann Leo Eva Sam Zoe Max Ida Ben Amy Dan Kim Roy Liz Jay Pam Ron Sue Ted".split()  # noqa: SIM905
OBJECTS = "apples pens coins books eggs cups toys cards shells stamps keys nuts".split()  # noqa: SIM905
RECALL = "recall"
ARITHMETIC = ("find", "lose", "together", "two_step")
Encode = Callable[[str], list[int]]


def is_test_pair(a: int, b: int) -> bool:
    """True for the one eighth of all operand pairs that only test problems use."""
    return (a * 37 + b * 101) % 8 == 3


def is_test_memo(name: str, code: int) -> bool:
    """True for the one eighth of all memos that only test prompts use."""
    return (NAMES.index(name) * 5 + code) % 8 == 3


@dataclass(frozen=True)
class Problem:
    """One question with its worked answer."""

    kind: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        return f" {self.answer}\n\n"


@dataclass(frozen=True)
class Mix:
    """Probabilities of what a training sequence holds. The drills teach single skills early on."""

    memo: float = 0.6  # a sequence has a memo block
    memo_count: int = 8
    recall: float = 0.25  # a question in such a sequence asks for a memo
    drill: float = 0.0
    lookup: float = 0.0
    copy: float = 0.0


def _operands(rng: random.Random, test: bool, subtract: bool = False, least: int = 0) -> tuple[int, int]:
    """Two operands from one side of the partition, whose sum or difference is at least `least`."""
    while True:
        a = rng.randint(12, 99) if subtract else rng.randint(10, 89)
        b = rng.randint(2, 9)
        if is_test_pair(a, b) == test and (a - b if subtract else a + b) >= least:
            return a, b


def _step(a: int, sign: str, b: int) -> str:
    result = a + b if sign == "+" else a - b
    return f"{a}{sign}{b}=<<{a}{sign}{b}={result}>>{result}."


def word_problem(rng: random.Random, test: bool) -> Problem:
    """One arithmetic problem of one or two steps, from the test side of the partition iff `test`."""
    (name, other, third), (thing, other_thing, third_thing) = rng.sample(NAMES, 3), rng.sample(OBJECTS, 3)
    kind = rng.choice(ARITHMETIC)
    least = {"lose": 10, "two_step": 10 + 9}.get(kind, 0) if test else 0  # two_step then loses up to 9
    a, b = _operands(rng, test, kind == "lose", least)
    facts = [f"{name} has {a} {thing}.", f"{other} has {rng.randint(10, 99)} {other_thing}."]
    third_fact = f"{third} has {rng.randint(10, 99)} {third_thing}."
    if kind == "find":
        ask = f"{name} finds {b} more {thing}. How many {thing} does {name} have now?"
        work, result = f"{name} has {a} {thing} and found {b}. {_step(a, '+', b)}", a + b
    elif kind == "lose":
        ask = f"{name} loses {b} {thing}. How many {thing} does {name} have left?"
        work, result = f"{name} has {a} {thing} and lost {b}. {_step(a, '-', b)}", a - b
    elif kind == "together":
        third_fact = f"{third} has {b} {thing}."
        ask = f"How many {thing} do {name} and {third} have together?"
        work, result = f"{name} has {a} {thing} and {third} has {b}. {_step(a, '+', b)}", a + b
    else:
        # 101 is odd, so eight consecutive operands meet every residue: both sides of the partition have some.
        lost = rng.choice([c for c in range(2, 10) if is_test_pair(a + b, c) == test])
        ask = f"{name} finds {b} more {thing} and then loses {lost} {thing}. How many {thing} does {name} have left?"
        work = (
            f"{name} has {a} {thing} and found {b}. {_step(a, '+', b)}\n{name} lost {lost}. {_step(a + b, '-', lost)}"
        )
        result = a + b - lost
    facts.append(third_fact)
    rng.shuffle(facts)
    return Problem(kind, " ".join([*facts, ask]), f"{work}\n#### {result}")


def _drill(rng: random.Random, test: bool) -> Problem:
    sign = rng.choice("+-")
    a, b = _operands(rng, test, subtract=sign == "-")
    result = a + b if sign == "+" else a - b
    return Problem("drill", f"What is {a}{sign}{b}?", f"{_step(a, sign, b)}\n#### {result}")


def _holdings(rng: random.Random, count: int, low: int) -> list[tuple[str, int, str]]:
    names, things = rng.sample(NAMES, count), rng.sample(OBJECTS, count)
    return [(name, rng.randint(low, 99), thing) for name, thing in zip(names, things, strict=True)]


def _lookup(rng: random.Random) -> Problem:
    holdings = _holdings(rng, rng.randint(2, 4), 10)
    name, number, thing = rng.choice(holdings)
    facts = " ".join(f"{n} has {v} {t}." for n, v, t in holdings)
    return Problem(
        "lookup", f"{facts} How many {thing} does {name} have?", f"{name} has {number} {thing}.\n#### {number}"
    )


def _copy(rng: random.Random) -> Problem:
    facts = [f"{n} has {v} {t}." for n, v, t in _holdings(rng, rng.randint(2, 5), 2)]
    question = " ".join(facts) + " Who has what?"
    if rng.random() < 0.6:
        rng.shuffle(facts)
    return Problem("copy", question, " ".join(facts))


def memos(rng: random.Random, test: bool, count: int = 8) -> list[tuple[str, int]]:
    """`count` (name, code) pairs with different names, all from one side of the partition."""
    pairs = []
    for name in rng.sample(NAMES, count):
        code = rng.randint(100, 999)
        while is_test_memo(name, code) != test:
            code = rng.randint(100, 999)
        pairs.append((name, code))
    return pairs


def memo_block(pairs: list[tuple[str, int]]) -> str:
    return "".join(f"Memo: {name}: {code}.\n" for name, code in pairs) + "\n"


def recall_problem(rng: random.Random, pairs: list[tuple[str, int]]) -> Problem:
    name, code = rng.choice(pairs)
    return Problem(RECALL, f"What is the code of {name}?", f"{name}: {code}.\n#### {code}")


def _segments(rng: random.Random, test: bool, mix: Mix) -> Iterator[str | Problem]:
    """An endless text: memo blocks as strings, and problems."""
    pairs: list[tuple[str, int]] = []
    if rng.random() < mix.memo:
        pairs = memos(rng, test, mix.memo_count)
        yield memo_block(pairs)
    while True:
        if pairs and rng.random() < mix.recall:
            yield recall_problem(rng, pairs)
            continue
        draw = rng.random()
        if draw < mix.drill:
            yield _drill(rng, test)
        elif draw < mix.drill + mix.lookup:
            yield _lookup(rng)
        elif draw < mix.drill + mix.lookup + mix.copy:
            yield _copy(rng)
        else:
            yield word_problem(rng, test)


def training_text(rng: random.Random, mix: Mix, problems: int) -> str:
    """Plain text with `problems` problems from the training side (for the tokenizer)."""
    text = ""
    for segment in _segments(rng, False, mix):
        text += segment if isinstance(segment, str) else segment.prompt + segment.completion
        problems -= isinstance(segment, Problem)
        if problems == 0:
            break
    return text


@dataclass(frozen=True)
class Example:
    """A tokenized sequence. `answer[i]` is the 1-based problem whose answer holds token i, 0 outside answers,
    -1 in an answer cut off by the end; `kinds[j - 1]` is the kind of problem j."""

    ids: list[int]
    answer: list[int]
    kinds: list[str]


def example(rng: random.Random, test: bool, mix: Mix, tokens: int, encode: Encode) -> Example:
    """A sequence of exactly `tokens` tokens."""
    ids: list[int] = []
    answer: list[int] = []
    kinds: list[str] = []
    for segment in _segments(rng, test, mix):
        if isinstance(segment, str):
            ids += encode(segment)
        else:
            ids += encode(segment.prompt)
            answer += [0] * (len(ids) - len(answer))
            ids += encode(segment.completion)
            kinds.append(segment.kind)
        mark = 0 if isinstance(segment, str) else len(kinds) if len(ids) <= tokens else -1
        answer += [mark] * (len(ids) - len(answer))
        if len(ids) >= tokens:
            break
    return Example(ids[:tokens], answer[:tokens], kinds)


def test_prompt(rng: random.Random, kind: str, tokens: int, encode: Encode) -> tuple[str, Problem]:
    """A prompt of about `tokens` tokens that ends in a held-out question, and that question.

    kind "arithmetic": shots from the training side, then a problem from the test side.
    kind "recall": a memo block from the test side, training-side problems as filler, then a recall question.
    """
    if kind not in ("arithmetic", RECALL):
        raise ValueError(f"kind: expected 'arithmetic' or 'recall', got {kind!r}")
    pairs = memos(rng, True) if kind == RECALL else []
    final = recall_problem(rng, pairs) if kind == RECALL else word_problem(rng, True)
    text = memo_block(pairs) if kind == RECALL else ""
    length = len(encode(text + final.prompt))
    while True:
        shot = word_problem(rng, False)
        shot_text = shot.prompt + shot.completion
        length += len(encode(shot_text))
        if length > tokens:
            return text + final.prompt, final
        text += shot_text


def write_test_set(path: Path, count: int, seed: int = 2024) -> None:
    """Write `count` different held-out arithmetic problems as JSONL with GSM8K's keys, question and answer."""
    rng = random.Random(seed)
    lines: dict[str, str] = {}
    while len(lines) < count:
        problem = word_problem(rng, True)
        lines[problem.question] = json.dumps({"question": problem.question, "answer": problem.answer})
    path.write_text("\n".join(lines.values()) + "\n", encoding="utf-8")
