"""The server launcher, with a stand-in for SGLang: any package that has a `launch_server` module will do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections import deque
from pathlib import Path

import pytest
import requests

from nsa_backend_plugin import serving
from tests.processes import HANGS_AFTER, gone, written

LAUNCH_SERVER = """
import http.server, os, subprocess, sys, time
port = int(next(a for a in sys.argv if a.startswith("--port=")).split("=")[1])
if "--die" in sys.argv:
    raise SystemExit("the real reason")
seen = next((a.split("=")[1] for a in sys.argv if a.startswith("--seen=")), "")
taken = "--taken" in sys.argv or seen and not os.path.exists(seen)
if taken:
    seen and open(seen, "w").close()
    print(f"ERROR: [Errno 98] error while attempting to bind on address ('127.0.0.1', {port})", flush=True)
if "--stuck" in sys.argv or taken:
    time.sleep(600)
died = next((a.split("=")[1] for a in sys.argv if a.startswith("--died=")), "")
if died and not os.path.exists(died):
    open(died, "w").close()
    raise SystemExit("EADDRINUSE" + chr(10) + ("more" + chr(10)) * 100)
stubborn = "import time, signal; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()  # now it ignores the signal
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake_sglang(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "fake" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(LAUNCH_SERVER)
    return {"PYTHONPATH": str(package.parent)}


def test_group_ends_with_the_block(tmp_path, fake_sglang):
    with serving.Server("model", (), fake_sglang, log_path=tmp_path / "log") as server:
        assert server.get("/health") == b"ok"
        assert server.running()
        child = int(written(tmp_path / "log", 2)[1])
        assert not gone(child)
    assert gone(child), "a child that ignores SIGTERM must not survive"
    assert not server.running()
    server.stop()


def test_death_is_reported_with_the_log(tmp_path, fake_sglang):
    server = serving.Server("model", ("--die",), fake_sglang, log_path=tmp_path / "log")
    with pytest.raises(serving.ServerError, match=r"exited with code 1[\s\S]*the real reason"):
        server.start()


def test_a_taken_port_is_reported_at_once(tmp_path, fake_sglang):
    port = serving.free_port()
    server = serving.Server("model", ("--taken",), fake_sglang, port=port, log_path=tmp_path / "log")
    with pytest.raises(serving.PortTakenError, match=f"port {port} is taken"):
        server.start()


def test_a_port_of_its_own_choice_that_is_taken_is_chosen_anew_once(tmp_path, fake_sglang):
    log = tmp_path / "log"
    server = serving.Server("model", (f"--seen={tmp_path / 'seen'}",), fake_sglang, log_path=log)
    first = server.port
    with server:
        assert server.port != first
        assert server.get("/health") == b"ok"
    always = serving.Server("model", ("--taken",), fake_sglang, log_path=log)
    with pytest.raises(serving.PortTakenError):
        always.start()


def test_a_server_that_ends_for_another_port_of_its_processes_is_started_again(tmp_path, fake_sglang):
    log, died = tmp_path / "log", tmp_path / "died"
    with serving.Server("model", (f"--died={died}",), fake_sglang, log_path=log) as server:
        assert died.exists()
        assert server.get("/health") == b"ok"
    died.unlink()
    fixed = serving.Server("model", (f"--died={died}",), fake_sglang, port=serving.free_port(), log_path=log)
    with pytest.raises(serving.PortTakenError, match="exited with code 1"):
        fixed.start()


def test_an_answer_that_is_an_error_is_shown(tmp_path, fake_sglang):
    with (
        serving.Server("model", (), fake_sglang, log_path=tmp_path / "log") as server,
        pytest.raises(requests.HTTPError, match=r"501 for /generate: [\s\S]*Unsupported method") as raised,
    ):
        server.post("/generate", {})
    assert raised.value.response.status_code == 501


def test_a_port_in_use_starts_nothing(tmp_path, fake_sglang):
    with socket.socket() as used:
        used.bind((serving.HOST, 0))
        used.listen()
        port = used.getsockname()[1]
        server = serving.Server("model", (), fake_sglang, port=port, log_path=tmp_path / "log")
        with pytest.raises(serving.ServerError, match=f"port {port} of 127.0.0.1 cannot be used: .*in use"):
            server.start()
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("port", [99999, 65536, 0, -5])
def test_what_is_not_a_port_is_refused(port):
    with pytest.raises(ValueError, match=f"port {port}: expected 1 to 65535"):
        serving.Server("model", port=port)


def test_a_program_that_is_not_there_leaves_no_handler(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        serving.Child(["/no-such-program"]).start()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_free_port_is_free(monkeypatch):
    with socket.socket() as used:
        used.bind((serving.HOST, serving.free_port()))
        used.listen()
        taken = used.getsockname()[1]
        drawn = iter([taken, 10_007, 10_007, taken, 10_008])
        monkeypatch.setattr(serving.secrets, "choice", lambda ports: next(drawn))
        monkeypatch.setattr(serving, "_given", deque())
        assert serving.free_port() == 10_007
        assert serving.free_port() == 10_008, "10007 was given already"


def test_timeout_stops_the_server(tmp_path, fake_sglang):
    server = serving.Server("model", ("--stuck",), fake_sglang, log_path=tmp_path / "log", timeout=1)
    with pytest.raises(serving.ServerError, match="not healthy after 1 s"):
        server.start()
    assert not server.running()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_parent_ends_the_group(tmp_path, fake_sglang, signum):
    log = tmp_path / "log"
    program = textwrap.dedent(f"""
        import time
        from nsa_backend_plugin.serving import Server
        Server("model", (), log_path={str(log)!r}).start()
        print(flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **fake_sglang},
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),  # a background job's children ignore SIGINT
    )
    child = int(written(log, 2)[1])
    assert parent.stdout.readline(), "the server has started"
    parent.send_signal(signum)
    assert parent.wait(HANGS_AFTER) != 0
    assert gone(child)
