"""The chat form: sgl-eval is a program of its own, here a stand-in with its files and exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa_backend_plugin import cli
from nsa_backend_plugin.accuracy import sgl_eval
from nsa_backend_plugin.accuracy.ask import AskError
from tests.processes import HANGS_AFTER, gone, written

#: Writes what sgl-eval 0.1.3 writes; questions named in the file `fail` beside it get its error samples.
PROGRAM = """#!{python}
import json, os, sys, time
from pathlib import Path
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
here = Path(__file__).parent
with (here / "calls").open("a") as calls: calls.write(json.dumps(sys.argv[1:]) + "\\n")
if (here / "hang").exists():
    (here / "pid").write_text(f"{{os.getpid()}}\\n")
    time.sleep(600)
out = Path(options["--out-dir"]) / f"sgl_eval_gsm8k_{{len((here / 'calls').read_text().splitlines())}}"
out.mkdir()
fail = (here / "fail").read_text().split() if (here / "fail").exists() else []
with (out / "output-rs0.jsonl").open("w", encoding="utf-8") as file:
    for line in open(options["--from-dataset"]):
        row = json.loads(line)
        failed = row["problem"] in fail
        file.write(json.dumps({{"id": row["id"], "predicted_answer": None if failed else str(row["expected_answer"]),
            "generation": "a\\u2028b", "symbolic_correct": not failed,
            "finish_reason": "error" if failed else "stop"}}, ensure_ascii=False) + "\\n")
    file.write('{{"id": "torn')
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sgl-eval").write_text(PROGRAM.format(python=sys.executable))
    (folder / "sgl-eval").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"problem": f"p{i}", "expected_answer": i}) + "\n" for i in range(6)))
    return path


def ask(chat: Path, out: Path, alive=lambda: True) -> list[sgl_eval.ChatAnswer]:
    rows = sgl_eval.load_questions(chat, None)
    return sgl_eval.answer_all("http://host", rows, out, concurrency=3, max_tokens=8, alive=alive)


def calls(program: Path) -> list[list[str]]:
    return [json.loads(line) for line in (program / "calls").read_text().splitlines()]


def test_failed_questions_are_asked_again(program, chat, tmp_path):
    (program / "fail").write_text("p2 p4")
    with pytest.raises(AskError, match=r"left 2 of 6 questions without an answer; the others are kept in .*out"):
        ask(chat, tmp_path / "out")
    (program / "fail").unlink()
    answers = ask(chat, tmp_path / "out")
    assert [answer.predicted for answer in answers] == [str(i) for i in range(6)]
    assert len((tmp_path / "out" / "questions.jsonl").read_text().splitlines()) == 2
    assert calls(program)[0][:4] == ["run", "gsm8k", "--base-url", "http://host/v1"]
    ask(chat, tmp_path / "out")
    assert len(calls(program)) == 2, "nothing is left to ask"
    chat.write_text(chat.read_text().replace("p3", "another p3"))
    assert len(ask(chat, tmp_path / "out")) == 6
    assert len((tmp_path / "out" / "questions.jsonl").read_text().splitlines()) == 1


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """SIGINT is ignored, as in a program that a script starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(300)
def test_a_dead_server_ends_it(program, chat, tmp_path, in_the_background):
    (program / "hang").touch()
    with pytest.raises(AskError, match="left 6 of 6"):
        ask(chat, tmp_path / "out", alive=lambda: not (program / "calls").exists())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_too(program, chat, tmp_path, signum):
    (program / "hang").touch()
    code = f"""
from pathlib import Path
from nsa_backend_plugin.accuracy import sgl_eval
rows = sgl_eval.load_questions(Path({str(chat)!r}), None)
folder = Path({str(tmp_path / "out")!r})
sgl_eval.answer_all("http://host", rows, folder, concurrency=3, max_tokens=8, alive=lambda: True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL), stderr=subprocess.PIPE
    )
    (pid,) = written(program / "pid", 1)
    parent.send_signal(signum)
    parent.communicate(timeout=HANGS_AFTER)
    assert parent.returncode != 0
    assert gone(int(pid))


@pytest.mark.parametrize("line, message", [("{", "chat.jsonl:7: not JSON"), ('{"problem": "x"}', "chat.jsonl:7: exp")])
def test_malformed_line_is_named(chat, line, message):
    chat.write_text(chat.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        sgl_eval.load_questions(chat, None)


def test_chat_form_is_part_of_the_report(program, chat, server, data, tmp_path, capsys):
    command = ["gsm8k", "--base-url", server.url, "--data-path", str(data), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--sgl-eval-data", str(chat), "--num-examples", "5"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["arms"][0]["sgl_eval"]["right"] == report["arms"][0]["sgl_eval"]["total"] == 5
    assert "sgl_eval" in capsys.readouterr().out
