"""Decode context parallelism in SGLang's servers: two processes that split a cache give transformers' answers.

tests/engine/cpu_dcp.py stands in for what only GPUs run. What our backends of a GPU do is in
test_decode_context_parallel.py.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nsa_backend_plugin.engine import launch, release
from tests.engine import cpu_dcp
from tests.engine import test_parity as parity
from tests.engine.prompts import compare

pytestmark = pytest.mark.engine

#: Name -> (model, arguments, how many of the prompts: those of the model with an indexer take Triton's interpreter
#: minutes). `make test` runs the first on the primary release and the last on the newest, `make test-pairs` all.
SERVERS = {
    "mla-page64-chunked": ("mla", ("--page-size=64", "--chunked-prefill-size=128"), 7),
    "mla-page1": ("mla", ("--page-size=1", "--dcp-comm-backend=ag_rs"), 7),
    "dsa-chunked": ("dsa", ("--chunked-prefill-size=128",), 6),
}


@pytest.fixture(scope="module", params=SERVERS)
def served(request, models, start_server, reference, tmp_path_factory):
    """(server, prompts, check) of a running server; check compares answers to prompts with transformers'."""
    kind, args, count = SERVERS[request.param]
    if kind == "dsa" and not release.exists(launch.SPLITS_ROWS_OF_INDEXED):
        pytest.skip("this release does not split the tokens of models with an indexer")
    env = {**parity.EXACT, **parity.CORES, **cpu_dcp.environment(tmp_path_factory.mktemp("dcp"))}
    with start_server(models[kind], ("--dtype=float32", "--tp=2", "--dcp-size=2", *args), env) as server:

        def check(prompts: list[list[int]], answers: list[dict[str, Any]]) -> None:
            guesses = {tuple(p): answer["output_ids"] for p, answer in zip(prompts, answers, strict=True)}
            reference.learn(kind, prompts, lambda prompt: guesses[tuple(prompt)])
            for prompt, answer in zip(prompts, answers, strict=True):
                compare(answer, reference(kind, prompt))

        yield server, parity.PROMPTS[:count], check


def test_prompts_at_once_and_behind_a_prefix_in_the_cache(served):
    server, prompts, check = served
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: parity._ask(server, prompt), prompts))
    assert not any(answer["meta_info"]["cached_tokens"] for answer in answers)
    answers += [parity._ask(server, prompt) for prompt in parity.PREFIXED]
    assert answers[-1]["meta_info"]["cached_tokens"] >= len(parity.SHARED)
    check([*prompts, *parity.PREFIXED], answers)
