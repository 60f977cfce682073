"""Prefill and decode in two servers on a CPU: caches travel over TCP, requests come through SGLang's router."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from nsa_backend_plugin.serving import HOST, Child, Server, free_port
from tests import transfer
from tests.engine import pairs
from tests.engine.prompts import INDEX_TOPK, LENGTHS, LOGPROB_BAR, NEW_TOKENS, answer, body, compare, tokens
from tests.processes import HANGS_AFTER, wait_until

pytest.importorskip("sglang", reason="needs SGLang")

pytestmark = pytest.mark.engine

#: For requests that share their batch: it changes float32 sums in the last bit, and the caches of DSA models round to
#: bf16 and fp8. 8e-4 was seen.
BATCHED_BAR = 1e-2
#: A server notices in seconds, not in minutes, that the other side of a request has gone. All prompts at once take a
#: busy machine many seconds too.
IMPATIENT = {
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "40",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "40",
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "1",
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
}
#: Slots of the decode server: two of these long answers do not fit, and one of them must wait in the host's memory.
SLOTS = 1024
LONG, LONG_TOKENS = 448, 72


#: Prompts whose answers come near no tie: each token's log-probability is 0.02 above the next one's, and how a batch
#: rounds does not change what the indexer selects (with other prompts it does, on one server too).
PROMPTS = [tokens(n, seed=1000 + n) for n in LENGTHS]
LONG_PROMPT = tokens(LONG, seed=5003)
#: Others for the negative control: what the decode server still has of the first in its memory are their index keys.
CONTROLS = [tokens(n, seed=n) for n in LENGTHS]


class Router(Child):
    """SGLang's router before a pair of servers."""

    def __init__(self, prefill: Server, bootstrap: int, decode: Server, log: Path):
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--disable-retries"]
        command += ["--prefill", prefill.url, str(bootstrap), "--decode", decode.url]
        command += ["--host", HOST, "--port", str(self.port), "--prometheus-port", str(free_port())]
        command += ["--worker-startup-check-interval", "1", "--disable-circuit-breaker"]
        # A server that is busy answers late, one that is gone is refused at once.
        command += ["--health-check-timeout-secs", "60", "--health-check-interval-secs", "5"]
        command += ["--health-success-threshold", "1"]
        super().__init__(command, log_path=log)

    def _wait_ready(self) -> None:
        wait_until(lambda: not self.running() or self._ready())
        if not self.running():
            raise RuntimeError(f"the router has ended; end of its log:\n{self.log_tail()}")

    def _ready(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/readiness", timeout=60).ok
        return False


@dataclass
class Pair:
    """A prefill and a decode server of one model, and the router before them."""

    prefill: Server
    decode: Server
    router: Router
    bootstrap: int
    #: (mode, env, port) -> another server for this pair, not started yet.
    role: Callable[..., Server]
    #: What one server answers to a prompt: {"tokens", "logprobs"}.
    expected: Callable[[list[int]], dict[str, list]]
    #: No index keys are sent while this file is there.
    leave_out: Path

    def ask(self, prompt: list[int], new_tokens: int = NEW_TOKENS) -> requests.Response:
        """Reply of the router."""
        return requests.post(f"{self.router.url}/generate", json=body(prompt, new_tokens), timeout=HANGS_AFTER)

    @contextlib.contextmanager
    def stream(self) -> Iterator[Iterator[bytes]]:
        """Events of a long answer, of which the first have come. The client leaves at the end of the block."""
        sent = body(PROMPTS[-2], SLOTS // 2, stream=True)
        with requests.post(f"{self.router.url}/generate", json=sent, timeout=HANGS_AFTER, stream=True) as reply:
            events = (line for line in reply.iter_lines() if line)
            for _ in range(3):
                assert next(events).startswith(b"data: {")
            yield events

    def check(self, prompt: list[int], reply: requests.Response, bar: float = LOGPROB_BAR) -> None:
        """Raise AssertionError unless it is what one server answers."""
        compare(reply.json(), self.expected(prompt), bar)

    def check_all(self) -> None:
        for prompt in PROMPTS:
            self.check(prompt, self.ask(prompt))


def _ask_directly(server: Server, room: dict[str, Any], timeout: float = HANGS_AFTER) -> requests.Response:
    return requests.post(f"{server.url}/generate", json=body(PROMPTS[5], **room), timeout=timeout)


def _wait_idle(server: Server) -> None:
    """Until the server holds no request."""

    def idle() -> bool:
        loads = json.loads(server.get("/v1/loads"))["loads"]
        return not any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)

    assert wait_until(idle), "requests are still there"


@contextlib.contextmanager
def _started(*servers: Server) -> Iterator[None]:
    """Start servers side by side; all end with the block."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(pairs.kill, server)
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.start, servers))
        yield


@pytest.fixture(scope="module", params=["dsa", "mla"])
def pair(request, models, start_server, reference, tmp_path_factory) -> Iterator[Pair]:
    """In float32: what else is in a batch hardly changes an answer."""
    kind, bootstrap, folder = request.param, free_port(), tmp_path_factory.mktemp("pair")
    transfer.require("sglang_router", "sglang-router")
    environment = {**transfer.environment(), **IMPATIENT}
    control, leave_out = pairs.control_plugin(folder)

    def start(env: Mapping[str, str], port: int | None = None, args: Sequence[str] = ()) -> Server:
        return start_server(models[kind], ("--dtype=float32", "--skip-server-warmup", *args), env, port)

    def role(mode: str, env: Mapping[str, str] | None = None, port: int | None = None) -> Server:
        args = pairs.arguments(mode, bootstrap)
        if mode == "decode":
            args += [f"--max-total-tokens={SLOTS}", "--num-reserved-decode-tokens=16"]
        return start({**environment, **(env or {})}, port, args)

    # MLA models keep their cache in float32, and test_parity shows that one server then answers as transformers does.
    alone = [start({})] if kind == "dsa" else []
    prefill, decode = role("prefill", control), role("decode")
    with _started(prefill, decode, *alone), Router(prefill, bootstrap, decode, folder / "router.log") as router:
        known: dict[tuple[int, ...], dict[str, list]] = {}
        pair = Pair(prefill, decode, router, bootstrap, role, lambda p: known[tuple(p)], leave_out)
        asked = [(p, NEW_TOKENS) for p in PROMPTS] + [(LONG_PROMPT, LONG_TOKENS)]
        if alone:
            asked += [(p, NEW_TOKENS) for p in CONTROLS]
            known |= {tuple(p): answer(alone[0].post("/generate", body(p, n))) for p, n in asked}
            pairs.kill(alone[0])
        else:
            for prompt, tokens in asked:
                reference.learn(kind, [prompt], lambda p, n=tokens: pair.ask(p, n).json()["output_ids"])
                known[tuple(prompt)] = reference(kind, prompt)
        yield pair


on_dsa = pytest.mark.parametrize("pair", ["dsa"], indirect=True)


def test_answers_are_those_of_one_server(pair):
    pair.check_all()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for prompt, reply in zip(PROMPTS, pool.map(pair.ask, PROMPTS), strict=True):
            pair.check(prompt, reply, BATCHED_BAR)


def test_a_full_decode_server_retracts_and_resumes(pair):
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(pair.ask, LONG_PROMPT, LONG_TOKENS) for _ in range(2)]
    assert "#retracted_reqs: 1" in pair.decode.log_path.read_text()
    for reply in replies:
        pair.check(LONG_PROMPT, reply.result(), BATCHED_BAR)


def test_clients_that_leave(pair):
    """While tokens come, and before the other server has heard of the request."""
    with pair.stream():
        pass
    for server in (pair.prefill, pair.decode):
        with pytest.raises(requests.Timeout):
            _ask_directly(server, pairs.room(pair.bootstrap), timeout=1)
    for server in (pair.prefill, pair.decode):
        _wait_idle(server)
    pair.check_all()


@on_dsa
def test_without_the_index_keys_answers_differ(pair):
    """The negative control: prompts that are no longer than index_topk need no indexer."""
    pair.leave_out.touch()
    answers = [pair.ask(prompt).json()["output_ids"] for prompt in CONTROLS]
    pair.leave_out.unlink()
    equal = {len(p) for p, a in zip(CONTROLS, answers, strict=True) if a == pair.expected(p)["tokens"]}
    assert equal == {n for n in LENGTHS if n <= INDEX_TOPK}
    for prompt in CONTROLS:
        pair.check(prompt, pair.ask(prompt))


@on_dsa
def test_layouts_that_differ_do_not_meet(pair):
    stranger, room = pair.role("decode", {"NSA_PLUGIN_INDEX_LAYOUT": "preshuffled"}), pairs.room(pair.bootstrap)
    with _started(stranger), ThreadPoolExecutor() as pool:
        prefilling = pool.submit(_ask_directly, pair.prefill, room, timeout=10)
        with pytest.raises(requests.RequestException):
            _ask_directly(stranger, room).raise_for_status()
        log = stranger.log_path.read_text()
    assert re.search(
        r"KV cache dtype mismatch: prefill server has kv_cache_dtype=\w+, but decode server has "
        r"kv_cache_dtype=\w+ with preshuffled index keys",
        log,
    )
    with pytest.raises(requests.Timeout):
        prefilling.result()
    _wait_idle(pair.prefill)
    pair.check(PROMPTS[-1], pair.ask(PROMPTS[-1]))


@on_dsa
def test_a_killed_server_is_an_error_to_the_other_side_which_goes_on(pair):
    with pair.stream() as events:
        pairs.kill(pair.decode)
        with contextlib.suppress(requests.RequestException):
            assert b"data: [DONE]" not in list(events)
    assert pair.ask(PROMPTS[0]).status_code >= 500
    successor = pair.role("decode", port=pair.decode.port)
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        prefilling = pool.submit(_ask_directly, pair.prefill, pairs.room(pair.bootstrap))
        stack.enter_context(_started(successor))
        assert prefilling.result().status_code >= 500
        _wait_idle(pair.prefill)
        assert wait_until(lambda: pair.ask(PROMPTS[0]).ok), "the router looks after its servers from time to time"
        pair.check_all()
        pairs.kill(pair.prefill)
        assert pair.ask(PROMPTS[0]).status_code >= 500
        assert _ask_directly(successor, pairs.room(pair.bootstrap)).status_code >= 500
        _wait_idle(successor)
        successor.get("/health")
