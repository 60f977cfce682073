"""Child processes that leave nothing behind, and an SGLang server among them: start it, wait until it is healthy."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import requests

from nsa_backend_plugin import BACKEND_NAME

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
#: Arguments that serve a small model on a CPU through the plugin.
CPU_ARGS = (
    "--device=cpu",
    f"--attention-backend={BACKEND_NAME}",
    "--sampling-backend=pytorch",
    "--disable-cuda-graph",
    "--max-total-tokens=8192",
    "--max-running-requests=8",
    "--sleep-on-idle",  # the scheduler polls at full speed otherwise
)
_SERVER_FIELDS = (
    "version",
    "device",
    "model_path",
    "attention_backend",
    "dtype",
    "kv_cache_dtype",
    "page_size",
    "tp_size",
    "dp_size",
)
#: What stock DSA runs; another backend leaves these at values that mean nothing.
_STOCK_FIELDS = ("dsa_prefill_backend", "dsa_decode_backend", "dsa_topk_backend", "dsa_paged_mqa_logits_backend")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PORT_TAKEN = "error while attempting to bind on address"  # uvicorn's words
#: What the last words of a server have in them, of which another program has one of the ports that SGLang drew for its
#: processes: torch's, the system's, SGLang's.
_ENDED_FOR_A_PORT = ("EADDRINUSE", "Address already in use", "Port is already in use")
_LAST_WORDS = 300  # lines: each process says something of its end
#: Of `free_port`: not where SGLang draws ports for its processes from (22000 to 29999), nor Mooncake (15000 to 17000).
_PORTS = (*range(10_000, 15_000), *range(17_001, 22_000))
#: What it gave last: servers that start together bind theirs late.
_given: deque[int] = deque(maxlen=1000)
_STOP_SECONDS = 5.0
_KILL_SECONDS = 3.0


class ServerError(RuntimeError):
    """The server died, or was not healthy in time; the message ends with the tail of its log."""


class PortTakenError(ServerError):
    """Another program listens on the server's port, or on one of its processes'."""


def free_port() -> int:
    """A TCP port that nothing listens on now, and that was not given lately.

    Below the range from which the system gives ports away: a server takes half a minute to bind its own.
    """
    while True:
        port = secrets.choice(_PORTS)
        if port in _given:
            continue
        with contextlib.suppress(OSError):
            _bind(port)
            _given.append(port)
            return port


def _bind(port: int) -> None:
    """Raises OSError when this process cannot listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))


def server_facts(base_url: str) -> dict[str, Any]:
    """Version and arguments as the server reports them; empty where it does not say (another kind of server)."""
    try:
        info = requests.get(f"{base_url}/server_info", timeout=30).json()
    except requests.RequestException:  # no answer, or none in JSON
        return {}
    fields = _SERVER_FIELDS if info.get("attention_backend") == BACKEND_NAME else (*_SERVER_FIELDS, *_STOCK_FIELDS)
    return {field: info[field] for field in fields if field in info}


class Child:
    """A command in a process group of its own.

    env: variables added to this process's environment. log_path: where its stdout and stderr go (None: to ours).
    stop_signal: what asks it to end; whatever is still there some seconds later is killed. takes_lines: its stdin is
    what `send` writes; else it has none.

    SIGINT or SIGTERM in this process, its exit, and the end of the `with` block all end the whole group. It holds
    what a process tree has lost: children whose parent has died.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        log_path: str | Path | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        takes_lines: bool = False,
    ):
        self.command = list(command)
        self.log_path = Path(log_path or os.devnull)
        self._to_log = log_path is not None
        self._env = {**os.environ, **(env or {})}
        self._stop_signal = stop_signal
        self._takes_lines = takes_lines
        self._process: subprocess.Popen[bytes] | None = None
        self._previous: dict[int, Any] = {}
        self._starting = False
        self._signalled: int | None = None

    def start(self) -> Self:
        """Raises OSError when the log cannot be written or the program is not there."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        atexit.register(self.stop)
        self._starting = True
        self._install_handlers()
        try:
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self.command,
                    bufsize=0,
                    stdin=subprocess.PIPE if self._takes_lines else subprocess.DEVNULL,
                    stdout=log if self._to_log else None,
                    stderr=log if self._to_log else None,
                    env=self._env,
                    start_new_session=True,
                    # A program that was started in the background ignores SIGINT, and its children inherit that.
                    preexec_fn=functools.partial(signal.signal, self._stop_signal, signal.SIG_DFL),
                )
            self._starting = False
            if self._signalled is not None:  # arrived while there was nothing to end yet
                self._on_signal(self._signalled, None)
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_ready(self) -> None:
        """Returns when the command can be used; what it raises ends the command."""

    def wait(self, timeout: float) -> int | None:
        """Exit code of the command, or None when it still runs after `timeout` seconds."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout)
        return None

    def send(self, line: str) -> None:
        """Write a line to the command's stdin; nobody hears it when the command has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())

    def stop(self) -> None:
        """End the whole process group; does nothing when it has ended already."""
        process, self._process = self._process, None
        self._starting = False
        self._restore_handlers()
        atexit.unregister(self.stop)
        if process is None:
            return
        if process.stdin:
            process.stdin.close()
        self._signal_group(process, self._stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        self._signal_group(process, signal.SIGKILL)  # also what outlived the group's leader
        process.wait()
        # A child that nobody reaps stays in the group: do not wait for ever.
        deadline = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < deadline and self._signal_group(process, 0):
            time.sleep(0.05)

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

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
        for signum, handler in list(self._previous.items()):
            # A child that started later has its own handlers on top, and calls ours once it has ended.
            if signal.getsignal(signum) == self._on_signal:
                signal.signal(signum, handler)
                del self._previous[signum]

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._starting:
            self._signalled = signum
            return
        self.stop()  # puts the previous handlers back
        os.kill(os.getpid(), signum)


class Server(Child):
    """`python -m sglang.launch_server`.

    model_path: a checkpoint folder. args: command-line arguments after it (`CPU_ARGS` for a small model on a CPU).
    port: 1 to 65535, None picks a free one. timeout: seconds until it must be healthy. python: interpreter that has
    SGLang (None = this one). Raises ValueError for another port.
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
        if port is not None and not 1 <= port <= 65535:
            raise ValueError(f"port {port}: expected 1 to 65535")
        self._chooses_port = port is None
        self.timeout = timeout
        command = [python or sys.executable, "-m", "sglang.launch_server", f"--model-path={model_path}"]
        super().__init__([*command, f"--host={HOST}", *args], env, log_path)
        self._use(port or free_port())

    def _use(self, port: int) -> None:
        self.port, self.url = port, f"http://{HOST}:{port}"
        self.command = [*(word for word in self.command if not word.startswith("--port=")), f"--port={port}"]

    def start(self) -> Self:
        """Start and wait for health. Raises ServerError at once when the port is taken, and with the log's tail when
        the server dies or is too late. For a port of its own choice, or SGLang's, taken since, it takes others, once.
        """
        try:
            return self._start()
        except PortTakenError:
            if not self._chooses_port:
                raise
        self._use(free_port())
        return self._start()

    def _start(self) -> Self:
        try:
            _bind(self.port)
        except OSError as error:
            raise PortTakenError(f"port {self.port} of {HOST} cannot be used: {error.strerror}") from None
        return super().start()

    def get(self, path: str, timeout: float = 60.0) -> bytes:
        """Body of a GET request. Raises requests.RequestException, also for an HTTP error."""
        reply = requests.get(self.url + path, timeout=timeout)
        reply.raise_for_status()
        return reply.content

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 300.0) -> Any:
        """Parsed JSON answer to a JSON POST. Raises requests.RequestException, an HTTP error with its text."""
        reply = requests.post(self.url + path, json=body, timeout=timeout)
        if not reply.ok:
            raise requests.HTTPError(f"{reply.status_code} for {path}: {reply.text[:500]}", response=reply)
        return reply.json()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            assert self._process is not None
            code = self._process.poll()
            if code is not None:
                taken = any(words in self.log_tail(_LAST_WORDS) for words in _ENDED_FOR_A_PORT)
                error = PortTakenError if taken else ServerError
                raise error(f"the server exited with code {code}; end of {self.log_path}:\n{self.log_tail()}")
            if _PORT_TAKEN in (tail := self.log_tail()):  # SGLang's processes live on
                raise PortTakenError(f"port {self.port} is taken; end of {self.log_path}:\n{tail}")
            with contextlib.suppress(requests.RequestException):
                self.get("/health", timeout=10.0)
                return
            time.sleep(0.5)
        raise ServerError(f"not healthy after {self.timeout:.0f} s; end of {self.log_path}:\n{self.log_tail()}")
