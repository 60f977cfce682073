"""Start an SGLang server as a child process, wait until it is healthy, and leave no process behind."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

HOST = "127.0.0.1"
#: Arguments that serve a small model on a CPU through the plugin.
CPU_ARGS = (
    "--device=cpu",
    "--attention-backend=nsa_plugin",
    "--sampling-backend=pytorch",
    "--disable-cuda-graph",
    "--max-total-tokens=8192",
    "--max-running-requests=8",
    "--sleep-on-idle",  # the scheduler polls at full speed otherwise
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PORT_TAKEN = "error while attempting to bind on address"  # uvicorn's words
_TERM_SECONDS = 5.0
_KILL_SECONDS = 3.0


class ServerError(RuntimeError):
    """The server died, or was not healthy in time; the message ends with the tail of its log."""


def free_port() -> int:
    """A TCP port that nothing listens on now.

    Below the range from which the system gives ports away: a server takes half a minute to bind its own.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port


class Server:
    """`python -m sglang.launch_server` in a process group of its own.

    model_path: a checkpoint folder. args: command-line arguments after it (`CPU_ARGS` for a small model on a CPU).
    env: variables added to this process's environment. port: None picks a free one. log_path: the server's stdout
    and stderr. timeout: seconds until it must be healthy. python: interpreter that has SGLang (None = this one).

    SIGINT or SIGTERM in this process, its exit, and the end of the `with` block all end the whole group.
    """

    def __init__(
        self,
        model_path: str | Path,
        args: Sequence[str] = CPU_ARGS,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        log_path: str | Path = "server.log",
        timeout: float = 300.0,
        python: str | None = None,
    ):
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log_path = Path(log_path)
        self.timeout = timeout
        self.command = [python or sys.executable, "-m", "sglang.launch_server", f"--model-path={model_path}"]
        self.command += [f"--host={HOST}", f"--port={self.port}", *args]
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}
        self._signalled: int | None = None

    def start(self) -> Server:
        """Start and wait for health. Raises ServerError with the log's tail when the server dies or is too late."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        atexit.register(self.stop)
        self._install_handlers()
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env, start_new_session=True
            )
        if self._signalled is not None:  # arrived while there was nothing to end yet
            self._on_signal(self._signalled, None)
        try:
            self._wait_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the whole process group; does nothing when it has ended already."""
        process, self._process = self._process, None
        self._restore_handlers()
        atexit.unregister(self.stop)
        if process is None:
            return
        self._signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERM_SECONDS)
        self._signal_group(process, signal.SIGKILL)  # also what outlived the group's leader
        process.wait()
        deadline = (
            time.monotonic() + _KILL_SECONDS
        )  # a child that nobody reaps stays in the group: do not wait for ever
        while time.monotonic() < deadline and self._signal_group(process, 0):
            time.sleep(0.05)

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str, timeout: float = 60.0) -> bytes:
        """Body of a GET request. Raises urllib.error.URLError."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as reply:
            return reply.read()

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 300.0) -> Any:
        """Parsed JSON answer to a JSON POST. Raises urllib.error.URLError."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.loads(reply.read())

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            assert self._process is not None
            code = self._process.poll()
            if code is not None:
                raise ServerError(f"the server exited with code {code}; end of {self.log_path}:\n{self.log_tail()}")
            if _PORT_TAKEN in (tail := self.log_tail()):  # SGLang's processes live on
                raise ServerError(f"port {self.port} is taken; end of {self.log_path}:\n{tail}")
            with contextlib.suppress(OSError):  # URLError is one
                self.get("/health", timeout=10.0)
                return
            time.sleep(0.5)
        raise ServerError(f"not healthy after {self.timeout:.0f} s; end of {self.log_path}:\n{self.log_tail()}")

    @staticmethod
    def _signal_group(process: subprocess.Popen[bytes], signum: int) -> bool:
        """Whether the group still exists."""
        try:
            os.killpg(process.pid, signum)  # start_new_session made the child its group's leader
        except ProcessLookupError:
            return False
        return True

    def _install_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            # A signal that this process was told to ignore (a background job's SIGINT) stays ignored.
            heeded = [s for s in _SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
            self._previous = {s: signal.signal(s, self._on_signal) for s in heeded}

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, handler)
        self._previous = {}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._process is None:
            self._signalled = signum
            return
        self.stop()  # puts the previous handlers back
        os.kill(os.getpid(), signum)
