"""The tiny DSA model's problems: right answers, disjoint training and test sides, prompts that need long recall."""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_dsa"
sys.path.insert(0, str(EXAMPLE))

import data  # noqa: E402
import train  # noqa: E402
from config import RECIPES  # noqa: E402
from tokenizer import Encoder  # noqa: E402

OPERATION = re.compile(r"<<(\d+)([+-])(\d+)=(\d+)>>")


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder()


def solve(question: str) -> int:
    """The answer of a word problem, from the question alone."""
    holds = {(name, thing): int(n) for name, n, thing in re.findall(r"(\w+) has (\d+) (\w+)\.", question)}
    together = re.search(r"How many (\w+) do (\w+) and (\w+) have together", question)
    if together:
        thing, *people = together.groups()
        return sum(holds[person, thing] for person in people)
    thing, name = re.search(r"How many (\w+) does (\w+) have", question).groups()  # type: ignore[union-attr]
    gained = sum(int(n) for n in re.findall(r"finds (\d+)", question))
    return holds[name, thing] + gained - sum(int(n) for n in re.findall(r"loses (\d+)", question))


def test_encoder_equals_tokenizers(seed, encode):
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    rng = random.Random(seed)
    text = data.training_text(rng, data.Mix(drill=0.2, lookup=0.2, copy=0.2), 60) + " unseen Words, 3.5%!\n\n  x"
    assert encode(text) == reference.encode(text).ids
    assert reference.decode(encode(text)) == text
    prompt, problem = data.test_prompt(rng, "recall", 500, encode)
    assert encode(prompt) + encode(problem.completion) == encode(prompt + problem.completion)
    with pytest.raises(ValueError, match="text"):
        encode("naïve")


def test_generator_is_a_function_of_the_seed(encode):
    def make(seed):
        rng = random.Random(seed)
        return data.example(rng, False, data.Mix(), 400, encode), data.test_prompt(rng, "recall", 400, encode)

    assert make(5) == make(5)
    assert make(5) != make(6)
    phase = replace(RECIPES["tiny-dsa"].phases[0], batch=2)
    ids, answer = train.Batches(phase, 10, seed=0)[3]
    assert torch.equal(ids, train.Batches(phase, 10, seed=0)[3][0])
    assert not torch.equal(ids, train.Batches(phase, 10, seed=1)[3][0])
    assert ids.shape == answer.shape == (2, phase.length + 1)


def test_partition_splits_every_operand_and_memo():
    """Every (a, b) and every memo is on one side only, and both sides exist for every first operand."""
    for first in range(10, 100):
        assert {data.is_test_pair(first, b) for b in range(2, 10)} == {True, False}
    share = sum(data.is_test_memo(n, c) for n in data.NAMES for c in range(100, 1000)) / (900 * len(data.NAMES))
    assert 0.1 < share < 0.15


@pytest.mark.parametrize("test", [False, True])
def test_problems_stay_on_their_side(seed, test):
    """With the partition above this is disjointness: no operation or memo of one side can occur on the other."""
    rng = random.Random(seed)
    mix = data.Mix(memo=1.0, drill=0.2, lookup=0.1, copy=0.1)
    for _ in range(200):
        segments = data._segments(rng, test, mix)
        for segment in (next(segments) for _ in range(20)):
            if isinstance(segment, str):
                pairs = [(name, int(code)) for name, code in re.findall(r"Memo: (\w+): (\d+)", segment)]
                assert len(pairs) == mix.memo_count
                assert all(data.is_test_memo(*pair) == test for pair in pairs)
            else:
                operations = OPERATION.findall(segment.answer)
                assert (segment.kind in (*data.ARITHMETIC, "drill")) == bool(operations)
                assert all(data.is_test_pair(int(a), int(b)) == test for a, _, b, _ in operations)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_training_reads_the_training_side_only(seed, encode, name):
    """What `train.py` feeds the model, phase by phase, as text again."""
    words = {i: token for token, i in encode.vocab.items()}
    memos: list[tuple[str, str]] = []
    for phase in RECIPES[name].phases:
        batches = train.Batches(replace(phase, batch=2 * 6144 // phase.length), 10, seed)
        text = "\n\n".join("".join(words[i] for i in row.tolist()) for row in batches[seed % 10][0])
        text = text.replace("\u0120", " ").replace("\u010a", "\n")
        operations = OPERATION.findall(text)
        assert len(operations) > 20
        assert not any(data.is_test_pair(int(a), int(b)) for a, _, b, _ in operations)
        memos += re.findall(r"Memo: (\w+): (\d{3})\.", text)
    assert len(memos) > 20
    assert not any(data.is_test_memo(person, int(code)) for person, code in memos)


def test_train_and_test_questions_do_not_meet(seed, encode):
    rng = random.Random(seed)
    trained = {data.word_problem(rng, False).question for _ in range(5000)}
    held_out = {data.word_problem(rng, True).question for _ in range(5000)}
    assert not trained & held_out
    prompt, problem = data.test_prompt(rng, "arithmetic", 1000, encode)
    shots, final = OPERATION.findall(prompt), OPERATION.findall(problem.answer)
    assert len(shots) > 5
    assert not {(a, b) for a, _, b, _ in shots} & {(a, b) for a, _, b, _ in final}


@pytest.mark.parametrize("test", [False, True])
def test_answers_are_right(seed, test):
    rng, seen = random.Random(seed), set()
    for _ in range(1000):
        problem = data.word_problem(rng, test)
        seen.add(problem.kind)
        assert int(problem.answer.split("#### ")[1]) == solve(problem.question)
        for a, sign, b, result in OPERATION.findall(problem.answer):
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert int(result) >= 10 or not test
    assert seen == set(data.ARITHMETIC)


def test_recall_is_out_of_reach_of_a_window(seed, encode):
    """The asked code stands in the memo block at the start and nowhere else."""
    prompt, problem = data.test_prompt(random.Random(seed), "recall", 3000, encode)
    memo, rest = prompt.split("\n\n", 1)
    code = problem.answer.split("#### ")[1]
    name = problem.question.removeprefix("What is the code of ").removesuffix("?")
    assert f"Memo: {name}: {code}." in memo
    assert code not in rest
    assert len(encode(rest)) > 2800
    assert len(encode(prompt)) <= 3000


def test_example_marks_answers(seed, encode):
    row = data.example(random.Random(seed), False, data.Mix(), 300, encode)
    assert len(row.ids) == len(row.answer) == 300
    words = {i: token for token, i in encode.vocab.items()}
    first = "".join(words[i] for i, mark in zip(row.ids, row.answer, strict=True) if mark == 1)
    assert re.search(r"####(\u0120\d)\d*\u010a\u010a$", first)
    assert "Question" not in first


def test_write_test_set(tmp_path):
    file = tmp_path / "test.jsonl"
    data.write_test_set(file, 50)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["question"] for row in rows}) == 50
    for row in rows:
        assert set(row) == {"question", "answer"}
        assert int(row["answer"].split("#### ")[1]) == solve(row["question"])
        assert all(data.is_test_pair(int(a), int(b)) for a, _, b, _ in OPERATION.findall(row["answer"]))
