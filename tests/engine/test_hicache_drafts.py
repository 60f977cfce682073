"""Drafts over a hierarchical cache on a CPU: every draft is the one of a cache that never left the device.

The next-token layer is random, so that its guesses are never right, and the answers would stay whatever came back of
its cache: compared are its guesses. tests/engine/cpu_hicache.py stands in for what only GPUs run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from nsa_backend_plugin.engine import release
from nsa_backend_plugin.layouts import INDEX_PAGE_SIZE
from nsa_backend_plugin.serving import Server
from tests import sglang_plugin
from tests.engine import cpu_drafts, cpu_hicache, pairs
from tests.engine.prompts import body, tokens
from tests.engine.reloaded_drafts import PARTS, Recorder
from tests.processes import HANGS_AFTER, wait_until

pytest.importorskip("sglang", reason="needs SGLang")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(release.hicache_draft_fault() is not None, reason="SGLang's hierarchical cache spoils drafts"),
]

LENGTH, NEW_TOKENS, KEPT = 448, 8, 384
#: Two prompts have room on the device, four on the host.
SLOTS, HOST_RATIO = 1024, 2


@dataclass
class Answer:
    tokens: list[int]
    cached: int
    drafts: list[str]


@dataclass
class Cached:
    """A server of a model with an indexer and a draft layer."""

    server: Server
    recorder: Recorder
    files: Path

    def ask(self, prompt: list[int]) -> Answer:
        before = len(self.recorder.lines())
        reply = self.server.post("/generate", body(prompt, NEW_TOKENS), HANGS_AFTER)
        said = reply["meta_info"]
        drafts = self.recorder.lines()[before:][: said["spec_verify_ct"]]
        return Answer(reply["output_ids"], said["cached_tokens"], drafts)

    def ask_all(self, prompts: Sequence[list[int]]) -> list[Answer]:
        return [self.ask(prompt) for prompt in prompts]

    def never_left(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """What each is answered right after it was asked."""
        return [[self.ask(prompt), self.ask(prompt)][1] for prompt in prompts]


PROMPTS = [tokens(LENGTH, seed) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def cached(start_server, tmp_path_factory) -> Iterator[Cached]:
    folder = tmp_path_factory.mktemp("hicache")
    (folder / "files").mkdir()
    recorder = Recorder(folder)
    sglang_plugin.declare(folder, "cpu_hicache", "tests.engine.cpu_hicache:register")
    env = {**recorder.environment, "DRAFTS": os.devnull, "TORCH_COMPILE_DISABLE": "1"}
    env["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(folder / "files")
    args = ["--dtype=float32", "--skip-server-warmup", f"--max-total-tokens={SLOTS}", f"--hicache-ratio={HOST_RATIO}"]
    args += [*cpu_hicache.ARGS, "--hicache-storage-backend=file", "--hicache-storage-prefetch-policy=wait_complete"]
    args += ["--speculative-algorithm=NEXTN", "--speculative-eagle-topk=1", "--speculative-num-steps=3"]
    server = start_server(
        cpu_drafts.write_model("dsa", folder / "model"), [*args, "--speculative-num-draft-tokens=4"], env
    )
    try:
        server.start()
        yield Cached(server, recorder, folder / "files")
    finally:
        pairs.kill(server)


@pytest.fixture(scope="module")
def never_left(cached: Cached) -> list[Answer]:
    return cached.never_left(PROMPTS)


def test_what_came_back_guesses_as_what_never_left(cached: Cached, never_left: list[Answer]) -> None:
    assert [one.cached for one in never_left] == [KEPT] * len(PROMPTS)
    assert cached.ask_all(PROMPTS) == never_left
    # They are written behind the answers: a page's latent rows in one, its index keys in another.
    written = 2 * len(PROMPTS) * (LENGTH // INDEX_PAGE_SIZE)
    assert wait_until(lambda: sum(file.stat().st_size > 0 for file in cached.files.iterdir()) == written)
    requests.post(f"{cached.server.url}/flush_cache?timeout=30", timeout=60).raise_for_status()
    assert cached.ask_all(PROMPTS) == never_left


@pytest.mark.parametrize("part", PARTS)
def test_without_a_part_of_its_cache_a_draft_differs(cached: Cached, never_left: list[Answer], part: str) -> None:
    """The negative control. Answers stay: wrong drafts are refused."""
    cached.recorder.leave_out(part)
    without = cached.ask_all(PROMPTS)
    cached.recorder.leave_out("")
    for one, expected in zip(without, never_left, strict=True):
        assert (one.tokens, one.cached) == (expected.tokens, expected.cached)
        assert one.drafts != expected.drafts
    assert cached.ask_all(PROMPTS) == never_left


def test_a_full_host_cache_answers_and_goes_on(cached: Cached) -> None:
    """More prompts than the host has room for."""
    prompts = [tokens(LENGTH, 10 + seed) for seed in range(5)]
    assert len(prompts) * LENGTH > SLOTS * HOST_RATIO
    first = cached.ask_all(prompts)
    assert [one.tokens for one in cached.ask_all(prompts)] == [one.tokens for one in first]
    last = cached.ask(prompts[-1])
    assert (last.tokens, last.cached) == (first[-1].tokens, KEPT)
