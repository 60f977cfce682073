"""`nsa-plugin gsm8k` against a server of our own making: data, resume, statistics, verdicts, messages."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from math import comb
from pathlib import Path

import pytest

from nsa_backend_plugin import cli
from nsa_backend_plugin.accuracy.arms import kernel_lines, parse_arms
from nsa_backend_plugin.accuracy.ask import Answer, AskError, answer_all
from nsa_backend_plugin.accuracy.compare import accuracy, compare, mcnemar
from nsa_backend_plugin.accuracy.questions import last_number, load_items


class FakeServer:
    """Answers `#### N` with N counted from the question; `fail_after` requests it closes the connection."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.fail_after: int | None = None
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.prompts.append(body["text"])
                if owner.fail_after is not None and len(owner.prompts) > owner.fail_after:
                    self.connection.close()
                    return
                number = body["text"].rsplit("Question: item ", 1)[1].split("\n")[0]
                meta = {"output_token_logprobs": [[-0.5, int(number), None]], "prompt_tokens": 7}
                reply = json.dumps({"text": f" so #### {number}", "meta_info": meta}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"question": f"item {i}", "answer": f"it is {i}\n#### {i}"} for i in range(12)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def ask(server: FakeServer, data: Path, out: Path) -> list[Answer]:
    items = load_items(data, 2, None)
    return answer_all(server.url, items, out, label="arm", concurrency=3, max_tokens=8, timeout=20)[0]


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
    [("{", "data.jsonl:13: not JSON"), ('{"question": "q"}', "data.jsonl:13: expected an object"), ("[]", ":13:")],
)
def test_malformed_line_is_named(data: Path, line: str, message: str) -> None:
    data.write_text(data.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_items(data, 2, None)


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


def test_timeout_names_the_question(data: Path, tmp_path: Path) -> None:
    silent = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # accepts, never answers
    items = load_items(data, 2, 1)
    with pytest.raises(AskError, match=r"no answer to data.jsonl:3 within 0 s|does not answer"):
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
    for bad in (["NAME=1"], ["nsa_plugin what"], ["dsa", "dsa"], [""]):
        with pytest.raises(ValueError, match="--arms"):
            parse_arms(bad)


def test_kernel_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[x] nsa_plugin op topk.select: torch (triton no)\nother\n[x] nsa_plugin op topk.select: torch (triton no)\n"
    )
    assert kernel_lines(log) == ["topk.select: torch (triton no)"]


def test_command_on_a_running_server(
    server: FakeServer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = [
        "gsm8k",
        "--base-url",
        server.url,
        "--data-path",
        str(data),
        "--num-shots",
        "2",
        "--out",
        str(tmp_path / "o"),
    ]
    assert cli.main(base) == 0
    assert "1.0000" in capsys.readouterr().out
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["arms"][0]["accuracy"]["right"] == 10
    data.write_text(data.read_text().replace("#### 5", "#### 6"))
    assert cli.main([*base, "--min-accuracy", "0.95"]) == 1
    assert cli.main([*base[:3], "--data-path", str(tmp_path / "missing.jsonl")]) == 2
    assert "missing.jsonl" in capsys.readouterr().err
