"""Exact mode: greedy tokens and log-probabilities of real servers equal transformers', in every way of asking."""

from __future__ import annotations

import inspect
import json
import re
import socket
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nsa_backend_plugin.engine import ledger
from nsa_backend_plugin.runtime import served as served_calls
from nsa_backend_plugin.serving import HOST, Server
from tests.engine.prompts import LENGTHS, body, compare, tokens
from tests.sglang_copies import RELEASES, patched_overlay

sglang = pytest.importorskip("sglang", reason="needs SGLang")
from sglang.srt.utils.numa_utils import init_threads_binding  # noqa: E402

pytestmark = pytest.mark.engine

EXACT = {"NSA_PLUGIN_EXACT": "1"}
CHUNKED = ("--chunked-prefill-size=128", "--enable-mixed-chunk")
#: Name -> (model, arguments). Between them: both models, page sizes 1 and 64, whole and chunked + mixed prefill, one
#: stage and two, which have processes, pools and layers of their own.
#: `make test` runs a part of them on each release, `make test-patched` all that are not patched already.
SERVERS = {
    "dsa-whole": ("dsa", ()),
    "dsa-chunked": ("dsa", CHUNKED),
    "mla-page1": ("mla", ("--page-size=1",)),
    "mla-page64-chunked": ("mla", ("--page-size=64", *CHUNKED)),
    "dsa-pipeline": ("dsa", ("--pp-size=2", *CHUNKED)),
    "mla-pipeline": ("mla", ("--pp-size=2",)),
    "dsa-chunked-patched": ("dsa", CHUNKED),
    "mla-page1-patched": ("mla", ("--page-size=1",)),
}
#: What two stages on one machine's cores need; an earlier SGLang counts tensor parallel ranks only, and refuses it.
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
#: Releases that may forget to abort the request of a client that has left: stock's race.
FORGETFUL = ("0.5.18", "0.5.19")
#: Servers whose SGLang has every source patch in place of our hooks.
PATCHED = [name for name in SERVERS if name.endswith("patched")]


PROMPTS = [tokens(n, seed=n) for n in LENGTHS]
SHARED = tokens(256, seed=1)
PREFIXED = [SHARED + tokens(20, seed=s) for s in (2, 3)]


def _ask(server: Server, prompt: list[int]) -> dict[str, Any]:
    return server.post("/generate", body(prompt))


@pytest.fixture(scope="module")
def patched_sglang(tmp_path_factory):
    """The environment in which a server finds SGLang patched."""
    folder = tmp_path_factory.mktemp("patched")
    patched_overlay(folder)
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module", params=SERVERS, ids=str)
def served(request, models, start_server, reference):
    """(server, model kind, check) of one running server; check compares an answer with transformers'."""
    kind, args = SERVERS[request.param]
    env = {**EXACT, **(request.getfixturevalue("patched_sglang") if request.param in PATCHED else {})}
    if request.param.endswith("pipeline") and "world_size" in inspect.signature(init_threads_binding).parameters:
        env |= CORES
    with start_server(models[kind], ("--dtype=float32", *args), env) as server:
        reference.learn(kind, [*PROMPTS, *PREFIXED], lambda prompt: _ask(server, prompt)["output_ids"])

        def check(prompt: list[int], answer: dict[str, Any]) -> None:
            compare(answer, reference(kind, prompt))

        yield server, kind, check


def _forget_prefixes(server: Server) -> None:
    # An answer may arrive before its request has left the batch: the server waits for that.
    request = urllib.request.Request(server.url + "/flush_cache?timeout=30", method="POST")
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.status == 200


def test_one_after_the_other(served):
    server, _, check = served
    _forget_prefixes(server)
    for prompt in PROMPTS:
        answer = _ask(server, prompt)
        assert answer["meta_info"]["cached_tokens"] == 0
        check(prompt, answer)


def test_eight_at_once(served):
    server, _, check = served
    _forget_prefixes(server)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for prompt, answer in zip(PROMPTS, pool.map(lambda p: _ask(server, p), PROMPTS), strict=True):
            check(prompt, answer)


def test_shared_prefix_comes_from_the_cache(served):
    server, _, check = served
    _forget_prefixes(server)
    first, second = (_ask(server, p) for p in PREFIXED)
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] >= len(SHARED)
    check(PREFIXED[0], first)
    check(PREFIXED[1], second)


def test_streamed(served):
    server, _, check = served
    prompt = PROMPTS[4]
    request = urllib.request.Request(
        server.url + "/generate",
        json.dumps(body(prompt, stream=True)).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        events = [line[len(b"data: ") :].strip() for line in reply if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    assert len(events) > 2, "the answer came in one piece"
    check(prompt, json.loads(events[-2]))


def test_after_a_client_hung_up(served):
    """The slots of an aborted request are reused; what it wrote must not show in later answers."""
    server, _, check = served
    _forget_prefixes(server)
    sent = json.dumps(
        {"input_ids": PROMPTS[6], "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}, "stream": True}
    ).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}"
    with socket.create_connection((HOST, server.port), timeout=60) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + sent)
        received = b""
        while received.count(b"data: ") < 3:
            received += connection.recv(4096)
    check(PROMPTS[5], _ask(server, PROMPTS[5]))
    for _ in range(100):  # of 16 steps each: the request has 3000
        if not _running_requests(server):
            break
        _ask(server, PROMPTS[0])
    # Where SGLang's own state of the request is gone before it aborts it, it forgets to: it runs on beside the others.
    forgotten = sglang.__version__ in FORGETFUL and "but the state was deleted in TokenizerManager" in _log(server)
    assert forgotten or _running_requests(server) == 0, "the aborted request is still running"
    check(PROMPTS[7], _ask(server, PROMPTS[7]))


def test_every_hook_fired(served, request):
    """Or stands down where its patch is applied; then only SGLang's own extension points are left in use."""
    server, kind, _ = served
    answer = server.post("/generate", body(PROMPTS[0], sampling_params={"json_schema": "{}", "max_new_tokens": 4}))
    assert answer["meta_info"]["completion_tokens"] > 0
    log = _log(server)
    patched = request.node.callspec.params["served"] in PATCHED
    rows = [row for row in ledger.LEDGER if row.stage in ("start", "cpu", "factory") and row.needed()]
    rows = [row for row in rows if row.kind in ("call", "hook") or (row.kind, kind) == ("op", "dsa")]
    assert len(rows) >= 3
    assert "nsa_plugin hook in use: factory\n" in log
    down = set(RELEASES[sglang.__version__].index) if patched else {row.name for row in ledger.LEDGER if row.patched}
    for row in rows:
        said = "hook stands down, its patch is applied" if row.name in down else "hook in use"
        assert f"nsa_plugin {said}: {row.name}\n" in log
    if patched:
        assert set(re.findall(r"nsa_plugin hook stands down, its patch is applied: (\w+)", log)) == down
        used = {"factory", "forward_method", *(["indexer"] if kind == "dsa" else [])}
        assert set(re.findall(r"nsa_plugin hook in use: (\w+)", log)) == used


EXAMPLES = {"dsa": "DeepSeek-V3.2, 16 heads", "mla": "DeepSeek-V3, 16 heads"}


def test_start_up_reports_every_operation(served):
    server, kind, _ = served
    log = _log(server)
    for line in served_calls.report(served_calls.examples("cpu")[EXAMPLES[kind]], served_calls.TYPICAL, "cpu"):
        assert f"nsa_plugin op {line.split(':')[0]}: torch for " in log
    assert "nsa_plugin op topk.select: torch runs" in log or kind == "mla"
    assert "exact mode" in log


def _log(server: Server) -> str:
    return server.log_path.read_text()


def _running_requests(server: Server) -> int:
    loads = json.loads(server.get("/v1/loads"))["loads"]
    return sum(load["num_running_reqs"] for load in loads)
