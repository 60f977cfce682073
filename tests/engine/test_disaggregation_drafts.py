"""Drafts between prefill and decode in two servers on a CPU: every draft is the one of a single server.

The next-token layer is random, so that its guesses are never right, and the answers would stay whatever was sent of it:
compared are its guesses. tests/engine/cpu_drafts.py stands in for what only GPUs run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nsa_backend_plugin.serving import Server, free_port
from tests import transfer
from tests.engine import cpu_drafts, pairs
from tests.engine.prompts import INDEX_TOPK, LENGTHS, LOGPROB_BAR, answer, body, tokens
from tests.processes import HANGS_AFTER

pytest.importorskip("sglang", reason="needs SGLang")

pytestmark = pytest.mark.engine

#: Slots of the decode server, 16 pages: two of these long answers do not fit.
SLOTS = 1024
LONG, LONG_TOKENS = 448, 72


def _prompts(seed: int) -> list[list[int]]:
    return [tokens(length, seed + length) for length in LENGTHS]


@dataclass
class Answer:
    """Tokens, their log-probabilities, and the tokens of each verification: what is known, and the drafts after it."""

    tokens: list[int]
    logprobs: list[float]
    drafts: list[list[int]]


@dataclass
class Pair:
    """Of a model of `cpu_drafts`: one server, and a prefill and a decode server."""

    kind: str
    one: Server
    prefill: Server
    decode: Server
    bootstrap: int
    folder: Path

    def ask_one(self, prompt: list[int]) -> Answer:
        return self._heard("one", lambda body: self.one.post("/generate", body, HANGS_AFTER), prompt)

    def ask(self, prompt: list[int]) -> Answer:
        return self._heard("decode", self._reply, prompt)

    def at_once(self, bodies: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Tokens of the answers."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return [reply["output_ids"] for reply in pool.map(self._reply, bodies)]

    def _reply(self, body: dict[str, Any]) -> Any:
        return pairs.ask(self.prefill, self.decode, self.bootstrap, body, HANGS_AFTER)

    def _heard(self, name: str, ask: Any, prompt: list[int]) -> Answer:
        before = len(self._drafts(name))
        reply = ask(body(prompt))
        said = reply["meta_info"]
        drafts = self._drafts(name)[before:]
        assert len(drafts) == said["spec_verify_ct"] > 0
        return Answer(**answer(reply), drafts=drafts)

    def _drafts(self, name: str) -> list[list[int]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def spoil(self, part: str) -> None:
        """From now on send another layer's in place of this part of the draft's cache; "" sends all again."""
        (self.folder / "spoilt").write_text(part)


#: Kind of the model, and steps of the draft.
CHAINS = {"dsa-3-1-4": ("dsa", 3), "dsa-1-1-2": ("dsa", 1), "mla-3-1-4": ("mla", 3)}


@pytest.fixture(scope="module", params=CHAINS.values(), ids=CHAINS)
def pair(request, start_server, tmp_path_factory) -> Iterator[Pair]:
    (kind, steps), folder, bootstrap = request.param, tmp_path_factory.mktemp("drafts"), free_port()
    model = cpu_drafts.write_model(kind, folder / "model")
    args = ["--dtype=float32", "--skip-server-warmup", "--speculative-algorithm=NEXTN", "--speculative-eagle-topk=1"]
    args += [f"--speculative-num-steps={steps}", f"--speculative-num-draft-tokens={steps + 1}"]

    def server(name: str, *more: str) -> Server:
        environment = {**transfer.environment(), **cpu_drafts.environment(folder, name), "TORCH_COMPILE_DISABLE": "1"}
        return start_server(model, [*args, *more], environment)

    prefill = server("prefill", *pairs.arguments("prefill", bootstrap))
    small = (f"--max-total-tokens={SLOTS}", "--num-reserved-decode-tokens=16")
    decode = server("decode", *pairs.arguments("decode", bootstrap), *small)
    made = Pair(kind, server("one"), prefill, decode, bootstrap, folder)
    servers = (made.one, made.prefill, made.decode)
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Server.start, servers))
        yield made
    finally:
        for each in servers:
            pairs.kill(each)


def test_drafts_are_those_of_one_server(pair: Pair) -> None:
    prompts = _prompts(1000)
    alone = [pair.ask_one(prompt) for prompt in prompts]
    for prompt, expected in zip(prompts, alone, strict=True):
        answer = pair.ask(prompt)
        assert answer.tokens == expected.tokens
        assert answer.drafts == expected.drafts
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=LOGPROB_BAR)
    assert pair.at_once([body(prompt) for prompt in prompts]) == [expected.tokens for expected in alone]


@pytest.mark.parametrize("pair", [CHAINS["dsa-3-1-4"]], ids=["dsa-3-1-4"], indirect=True)
def test_a_full_decode_server_retracts_and_resumes(pair: Pair) -> None:
    """Answers stay. SGLang keeps the cache of the model alone: the guesses of its draft may get worse."""
    bodies = [body(tokens(LONG, seed), LONG_TOKENS) for seed in (5003, 5004)]
    expected = [pair.one.post("/generate", body, HANGS_AFTER)["output_ids"] for body in bodies]
    assert pair.at_once(bodies) == expected
    assert "#retracted_reqs: 1" in pair.decode.log_path.read_text()


@pytest.mark.parametrize("part", cpu_drafts.PARTS)
def test_without_a_part_of_its_cache_drafts_differ(pair: Pair, part: str) -> None:
    """The negative control. Answers stay: wrong drafts are refused."""
    if (pair.kind, part) == ("mla", "index keys"):
        pytest.skip("the model has no indexer")
    prompts = _prompts(2000 + len(part))  # others: the decode server has the first ones' in its memory
    expected = [pair.ask_one(prompt) for prompt in prompts]
    pair.spoil(part)
    answers = [pair.ask(prompt) for prompt in prompts]
    pair.spoil("")
    assert [answer.tokens for answer in answers] == [one.tokens for one in expected]
    equal = {n for n, a, b in zip(LENGTHS, answers, expected, strict=True) if a.drafts == b.drafts}
    assert equal == {n for n in LENGTHS if part == "index keys" and n <= INDEX_TOPK}
    assert pair.ask(prompts[-1]).drafts == expected[-1].drafts
