"""The parts of `nsa-plugin gsm8k`: data, asking and resuming, statistics."""

from __future__ import annotations

import json
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from math import comb
from pathlib import Path

import pytest

from nsa_backend_plugin.accuracy.ask import Answer, AskError, answer_all
from nsa_backend_plugin.accuracy.compare import accuracy, compare, mcnemar
from nsa_backend_plugin.accuracy.questions import last_number, load_items
from nsa_backend_plugin.arms import kernel_lines, parse_arms
from tests.accuracy.conftest import FakeServer
from tests.processes import HANGS_AFTER


def ask(server: FakeServer, data: Path, out: Path) -> list[Answer]:
    items = load_items(data, 2, None)
    return answer_all(server.url, items, out, label="arm", concurrency=3, max_tokens=8, timeout=HANGS_AFTER)[0]


def test_prompt_is_the_few_shot_completion_form(data: Path) -> None:
    items = load_items(data, 2, 3)
    assert len(items) == 3
    shots = "Question: item 0\nAnswer: it is 0\n#### 0\n\nQuestion: item 1\nAnswer: it is 1\n#### 1\n\n"
    assert items[0].prompt == shots + "Question: item 2\nAnswer:"
    assert items[0].expected == 2


def test_same_form_as_sglang(data: Path) -> None:
    common = pytest.importorskip("sglang.test.simple_eval_mixed_prefix_gsm8k")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    ours = load_items(data, 5, None)[0].prompt
    assert ours == common.get_few_shot_examples(rows, 5) + common.get_one_example(rows, 5, include_answer=False)
    for text in ("so 1,234.5 it is", "#### -7", "3 and 4", "12."):
        assert last_number(text) == common.get_answer_value(text)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "data.jsonl:13: not JSON"),
        ('{"question": "q"}', "data.jsonl:13: expected an object"),
        ("[]", ":13: expected an object"),
        ('{"question": "q", "answer": "1", "context": 3}', ':13: "context": expected a string, got 3'),
    ],
)
def test_malformed_line_is_named(data: Path, line: str, message: str) -> None:
    data.write_text(data.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_items(data, 2, None)


def test_only_a_newline_ends_a_line(data: Path) -> None:
    data.write_text('{"question": "one\u2028two\x85", "answer": "1"}\r\n' + data.read_text(), encoding="utf-8")
    assert "one\u2028two\x85" in load_items(data, 0, None)[0].prompt


def test_data_that_cannot_be_used_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--num-examples 0: expected at least 1"):
        load_items(data, 2, 0)
    with pytest.raises(ValueError, match=r"--num-shots 12: .* has 12 rows"):
        load_items(data, 12, None)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        load_items(tmp_path / "nothing.jsonl", 0, None)
    data.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"data.jsonl: not UTF-8"):
        load_items(data, 0, None)


def test_answer_without_number_is_refused(data: Path) -> None:
    data.write_text(data.read_text() + json.dumps({"question": "q", "answer": "none"}) + "\n")
    with pytest.raises(ValueError, match="row 13 has no number"):
        load_items(data, 2, None)


def test_answers_are_scored_and_resumed(server: FakeServer, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    server.fail_after = 4
    with pytest.raises(AskError, match="answers are kept"):
        ask(server, data, out)
    kept = len(out.read_text().splitlines())
    assert 0 < kept < 10
    out.write_text(out.read_text() + '{"key": "torn')  # killed while writing
    server.fail_after, asked = None, len(server.prompts)
    answers = ask(server, data, out)
    assert len(server.prompts) - asked == 10 - kept
    assert [a.predicted for a in answers] == list(range(2, 12))
    assert all(a.correct for a in answers)


def test_changed_prompts_are_asked_again(server: FakeServer, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    ask(server, data, out)
    data.write_text(data.read_text().replace("it is 0", "it was 0"))
    asked = len(server.prompts)
    ask(server, data, out)
    assert len(server.prompts) - asked == 10


def test_fewer_questions_do_not_drop_answers(server: FakeServer, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    ask(server, data, out)
    few = load_items(data, 2, 3)
    answer_all(server.url, few, out, label="arm", concurrency=3, max_tokens=8, timeout=HANGS_AFTER)
    asked = len(server.prompts)
    ask(server, data, out)
    assert len(server.prompts) == asked


def test_damaged_results_are_named(server: FakeServer, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    ask(server, data, out)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join([*lines[:4], "damaged\n", *lines[4:]]))
    with pytest.raises(ValueError, match=r"answers.jsonl:5: not a finished answer"):
        ask(server, data, out)


def test_answers_under_way_are_kept_when_another_fails(
    server: FakeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request fails at once; those beside it answer after that, and hardly anything new is asked."""
    server.refuse = "item 2\n"
    server.open.clear()
    cancelled: list[Future] = []

    def cancel(future: Future) -> bool:
        done = really_cancel(future)
        cancelled.append(future)
        if len(cancelled) == 9:  # all but the one that was refused
            server.open.set()
        return done

    really_cancel = Future.cancel
    monkeypatch.setattr(Future, "cancel", cancel)
    with pytest.raises(AskError, match=r"data.jsonl:3 was refused: 500 .* of 10 answers are kept"):
        ask(server, data, tmp_path / "answers.jsonl")
    kept = len((tmp_path / "answers.jsonl").read_text().splitlines())
    assert 2 <= kept == len(server.prompts) - 1 <= 3


@pytest.mark.parametrize("reply", ["{}", '"text"', "not json"])
def test_foreign_answers_are_named(server: FakeServer, data: Path, tmp_path: Path, reply: str) -> None:
    server.reply = reply
    with pytest.raises(AskError, match=r"the answer to data.jsonl:\d+ is not"):
        ask(server, data, tmp_path / "answers.jsonl")


def test_timeout_names_the_question(data: Path, tmp_path: Path) -> None:
    silent = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # accepts, never answers
    items = load_items(data, 2, 1)
    with pytest.raises(AskError, match=r"no answer to data.jsonl:3 within 0.3 s \(0 of 1 answers are kept"):
        answer_all(
            f"http://127.0.0.1:{silent.server_port}",
            items,
            tmp_path / "a",
            label="x",
            concurrency=1,
            max_tokens=1,
            timeout=0.3,
        )
    silent.server_close()


def test_mcnemar_is_the_exact_binomial_tail() -> None:
    for only_a, only_b in product(range(7), repeat=2):
        n = only_a + only_b
        tail = sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= comb(n, only_a))
        assert mcnemar(only_a, only_b) == pytest.approx(min(1.0, tail / 2**n))


def test_wilson_interval_holds_known_values() -> None:
    score = accuracy([True] * 95 + [False] * 5)
    assert score.value == 0.95
    assert (score.low, score.high) == pytest.approx((0.8882, 0.9785), abs=1e-4)


def made(key: str, correct: bool, tokens: list[int], logprobs: list[float]) -> Answer:
    return Answer(key, "hash", str(tokens), float(correct), correct, tokens, logprobs, 1, 0.1)


def test_comparison_pairs_answers() -> None:
    a = [made("1", True, [1, 2, 3], [-0.1, -0.2, -0.3]), made("2", True, [4], [-1.0])]
    b = [made("1", True, [1, 2, 9], [-0.2, -0.4, -5.0]), made("2", False, [5], [-1.0])]
    result = compare(a, b)
    assert (result.only_a, result.only_b, result.agreement) == (1, 0, 0.5)
    assert result.logprob_difference == pytest.approx(0.15)
    assert not result.differs
    worse = compare([made("1", True, [1], [0.0])] * 12, [made("1", False, [1], [0.0])] * 12)
    assert worse.differs


def test_arms() -> None:
    assert [a.backend for a in parse_arms(["nsa_plugin,dsa"])] == ["nsa_plugin", "dsa"]
    (arm,) = parse_arms(["nsa_plugin NSA_PLUGIN_SPARSE_MLA_IMPL=torch --page-size=64"])
    assert arm.env == {"NSA_PLUGIN_SPARSE_MLA_IMPL": "torch"}
    assert arm.args == ("--page-size=64",)
    long = [f"dsa {' '.join(f'NAME{n}=value' for n in range(40))} LAST={last}" for last in (1, 2)]
    names = {arm.file_name for arm in parse_arms(long)}
    assert len(names) == 2
    assert max(map(len, names)) < 200
    for bad in (["NAME=1"], ["nsa_plugin what"], ["dsa", "dsa"], [""]):
        with pytest.raises(ValueError, match="--arms"):
            parse_arms(bad)


def test_kernel_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[x] nsa_plugin op topk.select: cuda for rows=1 (x); triton comes later\n"
        "[x] nsa_plugin op topk.select: cuda declines k=9000: at most 4096\n"
        "[x] nsa_plugin op topk.select: torch runs k=9000 (x)\nother\n"
        "[y] nsa_plugin op topk.select: torch runs k=9000 (x)\n"
    )
    assert kernel_lines(log) == ["topk.select: torch runs k=9000 (x)"]
