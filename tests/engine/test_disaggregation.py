"""Prefill and decode in two servers on a CPU: caches travel over TCP, requests come through SGLang's router."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from nsa_backend_plugin.serving import HOST, Child, Server, free_port
from tests import transfer

pytest.importorskip("sglang", reason="needs SGLang")

pytestmark = pytest.mark.engine

NEW_TOKENS = 16
LOGPROB_BAR = 1e-3
INDEX_TOPK = 32
LENGTHS = (5, 17, 64, 65, 129, 200, 333, 700)
#: A server notices in seconds, not in minutes, that the other side of a request has gone.
IMPATIENT = {
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "8",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "8",
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "1",
}
PATIENCE = 60.0
#: Slots of the decode server: two of these long answers do not fit, and one of them must wait in the host's memory.
SLOTS = 1024
LONG, LONG_TOKENS = 333, 300
#: A plugin of SGLang for the negative control: the pool hands over no index keys.
LEAVES_OUT = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def register():
    target = "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool.get_state_buf_infos"
    HookRegistry.register(target, lambda original, pool: ([], [], []), HookType.AROUND)
"""


def _tokens(count: int) -> list[int]:
    generator = random.Random(count)
    return [generator.randrange(5, 500) for _ in range(count)]


PROMPTS = {n: _tokens(n) for n in LENGTHS}


def _body(prompt: list[int], new_tokens: int = NEW_TOKENS, **extra: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, **extra}


class Router(Child):
    """SGLang's router before a pair of servers."""

    def __init__(self, prefill: Server, bootstrap: int, decode: Server, log: Path):
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--disable-retries"]
        command += ["--prefill", prefill.url, str(bootstrap), "--decode", decode.url]
        command += ["--host", HOST, "--port", str(self.port), "--prometheus-port", str(free_port())]
        command += ["--health-check-interval-secs", "2", "--worker-startup-check-interval", "1"]
        super().__init__([*command, "--disable-circuit-breaker"], log_path=log)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.running():
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/readiness", timeout=5).ok:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the router is not ready; end of its log:\n{self.log_tail()}")


@dataclass
class Pair:
    """A prefill and a decode server of one model, the router before them, and what one server alone answers."""

    prefill: Server
    decode: Server
    router: Router
    bootstrap: int
    expected: dict[int, dict[str, Any]]
    expected_long: list[int]
    #: (mode, bootstrap port, env, port) -> another server of the same model, not started yet.
    role: Callable[..., Server]

    def ask(self, length: int, new_tokens: int = NEW_TOKENS) -> requests.Response:
        """Reply of the router."""
        body = _body(PROMPTS[length], new_tokens, return_logprob=True)
        return requests.post(f"{self.router.url}/generate", json=body, timeout=PATIENCE)

    @contextlib.contextmanager
    def stream(self, length: int) -> Iterator[Iterator[bytes]]:
        """Events of a long answer, of which the first have come. The client leaves at the end of the block."""
        body = _body(PROMPTS[length], SLOTS // 2, stream=True)
        with requests.post(f"{self.router.url}/generate", json=body, timeout=PATIENCE, stream=True) as reply:
            events = (line for line in reply.iter_lines() if line)
            for _ in range(3):
                assert next(events).startswith(b"data: {")
            yield events

    def check(self, length: int, answer: dict[str, Any]) -> None:
        """Raise AssertionError unless it is what one server answers."""
        expected = self.expected[length]
        assert answer["output_ids"] == expected["output_ids"]
        ours, theirs = ([row[0] for row in a["meta_info"]["output_token_logprobs"]] for a in (answer, expected))
        assert len(ours) == NEW_TOKENS
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < LOGPROB_BAR

    def check_all(self) -> None:
        for length in LENGTHS:
            self.check(length, self.ask(length).json())


def _room(bootstrap: int) -> dict[str, Any]:
    """What the router adds to a request, so that the two servers find one another."""
    return {"bootstrap_host": HOST, "bootstrap_port": bootstrap, "bootstrap_room": random.getrandbits(48)}


def _ask_directly(server: Server, length: int, room: dict[str, Any], timeout: float = PATIENCE) -> requests.Response:
    return requests.post(f"{server.url}/generate", json=_body(PROMPTS[length], **room), timeout=timeout)


def _ask_both(prefill: Server, decode: Server, length: int, bootstrap: int) -> requests.Response:
    """Reply of a decode server to a request as the router sends it to both."""
    room = _room(bootstrap)
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(_ask_directly, server, length, room) for server in (prefill, decode)]
    return replies[1].result()


def _wait_idle(server: Server) -> None:
    """Until the server holds no request."""
    deadline = time.monotonic() + PATIENCE
    while any(
        load["num_running_reqs"] + load["num_waiting_reqs"] for load in json.loads(server.get("/v1/loads"))["loads"]
    ):
        assert time.monotonic() < deadline, "requests are still there"
        time.sleep(0.2)


@pytest.fixture(scope="module", params=["dsa", "mla"])
def pair(request, models, start_server, tmp_path_factory) -> Iterator[Pair]:
    environment = {**transfer.environment(), **IMPATIENT}
    model, bootstrap = models[request.param], free_port()

    def role(mode: str, bootstrap: int, env: Mapping[str, str] | None = None, port: int | None = None) -> Server:
        flags = (f"--disaggregation-mode={mode}", f"--disaggregation-bootstrap-port={bootstrap}")
        if mode == "decode":
            flags += (f"--max-total-tokens={SLOTS}", "--num-reserved-decode-tokens=16")
        return start_server(model, ("--skip-server-warmup", *flags), {**environment, **(env or {})}, port)

    alone, prefill, decode = start_server(model), role("prefill", bootstrap), role("decode", bootstrap)
    with contextlib.ExitStack() as stack:
        for server in (alone, prefill, decode):
            stack.callback(server.stop)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.start, (alone, prefill, decode)))
        expected = {n: alone.post("/generate", _body(p, return_logprob=True)) for n, p in PROMPTS.items()}
        expected_long = alone.post("/generate", _body(PROMPTS[LONG], LONG_TOKENS))["output_ids"]
        alone.stop()
        router = Router(prefill, bootstrap, decode, tmp_path_factory.mktemp("router") / "router.log")
        yield Pair(prefill, decode, stack.enter_context(router), bootstrap, expected, expected_long, role)


on_dsa = pytest.mark.parametrize("pair", ["dsa"], indirect=True)


def test_answers_are_those_of_one_server(pair):
    pair.check_all()
    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        for length, reply in zip(LENGTHS, pool.map(pair.ask, LENGTHS), strict=True):
            pair.check(length, reply.json())


def test_a_full_decode_server_retracts_and_resumes(pair):
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(pair.ask, LONG, LONG_TOKENS) for _ in range(2)]
    assert "#retracted_reqs: 1" in pair.decode.log_path.read_text()
    for reply in replies:
        assert reply.result().json()["output_ids"] == pair.expected_long


def test_clients_that_leave(pair):
    """While tokens come, and before the other server has heard of the request."""
    with pair.stream(333):
        pass
    for server in (pair.prefill, pair.decode):
        with pytest.raises(requests.Timeout):
            _ask_directly(server, 200, _room(pair.bootstrap), timeout=1)
    for server in (pair.prefill, pair.decode):
        _wait_idle(server)
    pair.check_all()


@on_dsa
def test_without_the_index_keys_answers_differ(pair, tmp_path):
    """The negative control: prompts that are no longer than index_topk need no indexer."""
    (tmp_path / "leaves_out.py").write_text(LEAVES_OUT)
    entry = tmp_path / "leaves_out-1.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: leaves-out\nVersion: 1\n")
    (entry / "entry_points.txt").write_text("[sglang.srt.plugins]\nleaves_out = leaves_out:register\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    bootstrap = free_port()
    with pair.role("prefill", bootstrap, {"PYTHONPATH": path}) as prefill:
        answers = {n: _ask_both(prefill, pair.decode, n, bootstrap).json()["output_ids"] for n in LENGTHS}
    equal = {n for n in LENGTHS if answers[n] == pair.expected[n]["output_ids"]}
    assert equal == {n for n in LENGTHS if n <= INDEX_TOPK}


@on_dsa
def test_layouts_that_differ_do_not_meet(pair):
    with pair.role("decode", pair.bootstrap, {"NSA_PLUGIN_INDEX_LAYOUT": "preshuffled"}) as decode:
        with pytest.raises(requests.RequestException):
            _ask_both(pair.prefill, decode, 200, pair.bootstrap).raise_for_status()
        log = decode.log_path.read_text()
    assert re.search(
        r"KV cache dtype mismatch: prefill server has kv_cache_dtype=\w+, but decode server has "
        r"kv_cache_dtype=\w+ with preshuffled index keys",
        log,
    )
    _wait_idle(pair.prefill)
    pair.check(200, pair.ask(200).json())


@on_dsa
def test_a_killed_server_is_an_error_to_the_other_side_which_goes_on(pair):
    with pair.stream(333) as events:
        _kill(pair.decode)
        with contextlib.suppress(requests.RequestException):
            assert b"data: [DONE]" not in list(events)
    assert pair.ask(64).status_code >= 500
    assert _ask_directly(pair.prefill, 64, _room(pair.bootstrap)).status_code >= 500
    _wait_idle(pair.prefill)
    with pair.role("decode", pair.bootstrap, port=pair.decode.port) as successor:
        deadline = time.monotonic() + PATIENCE
        while (
            not pair.ask(64).ok and time.monotonic() < deadline
        ):  # the router looks after its servers every other second
            time.sleep(0.5)
        pair.check_all()
        _kill(pair.prefill)
        assert pair.ask(64).status_code >= 500
        assert _ask_directly(successor, 64, _room(pair.bootstrap)).status_code >= 500
        _wait_idle(successor)
        successor.get("/health")


def _kill(server: Server) -> None:
    os.killpg(server._process.pid, signal.SIGKILL)
    server.stop()
