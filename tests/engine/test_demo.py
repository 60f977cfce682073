"""`nsa-plugin demo` as a user runs it: right answers, exit codes, and no process left behind after Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import ROOT, SERVER_ENV
from tests.processes import HANGS_AFTER, wait_until

pytestmark = pytest.mark.engine
_MARK = "NSA_TEST_DEMO_ID"


def marked_processes(mark: str) -> list[int]:
    """Processes that inherited the mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{_MARK}={mark}\0".encode() in (folder / "environ").read_bytes() + b"\0":
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


class Demo:
    """The command in a session of its own, so that its process group can get the terminal's Ctrl-C."""

    def __init__(self, folder: Path, *arguments: str):
        self.mark = uuid.uuid4().hex
        self.output = folder / "output.txt"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nsa_backend_plugin.cli", "demo", f"--log={folder / 'server.log'}", *arguments],
                cwd=ROOT,
                env={**os.environ, **SERVER_ENV, _MARK: self.mark},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
            )

    def text(self) -> str:
        return self.output.read_text()

    def interrupt(self) -> int:
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(HANGS_AFTER)


@pytest.fixture
def demo(tmp_path) -> Iterator:
    started: list[Demo] = []

    def start(*arguments: str) -> Demo:
        started.append(Demo(tmp_path, *arguments))
        return started[-1]

    yield start
    for one in started:
        for pid in marked_processes(one.mark):
            os.kill(pid, signal.SIGKILL)
        one.process.wait()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("processes", [2, 3], ids=["while starting", "with a scheduler"])
def test_interrupt_leaves_no_process(demo, processes):
    running = demo()
    assert wait_until(lambda: len(marked_processes(running.mark)) >= processes), running.text()
    assert running.interrupt() == 130
    assert wait_until(lambda: not marked_processes(running.mark), 60), marked_processes(running.mark)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_serve_answers_everything_and_stops_on_interrupt(demo):
    running = demo("--serve")
    assert wait_until(lambda: "until Ctrl-C" in running.text() or running.process.poll() is not None)
    text = running.text()
    assert "7 of 7 answers right" in text
    assert "WRONG" not in text
    assert "tokens/s" in text
    assert "sparse_mla.attend: torch" in text, "the kernel of every operation is shown"
    assert "curl -s http://127.0.0.1:" in text
    assert running.interrupt() == 0
    assert wait_until(lambda: not marked_processes(running.mark), 60), marked_processes(running.mark)


def test_a_server_that_dies_is_a_failure(demo):
    dying = demo("--", "--page-size=32")
    assert dying.process.wait(HANGS_AFTER) == 1
    assert "page size 64" in dying.text()
