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

pytestmark = pytest.mark.engine

#: Name -> (model, arguments, how many of the prompts: those of the model with an indexer take Triton's interpreter
#: minutes). `make test` runs the first on the primary release and the last on the newest, `make test-pairs` all.
SERVERS = {
    "mla-page64-chunked": ("mla", ("--page-size=64", "--chunked-prefill-size=128"), 8),
    "mla-page1": ("mla", ("--page-size=1", "--dcp-comm-backend=ag_rs"), 8),
    "dsa-chunked": ("dsa", ("--chunked-prefill-size=128",), 6),
}


@pytest.fixture(scope="module", params=SERVERS)
def served(request, models, start_server, reference, tmp_path_factory):
    """(server, prompts, check) of a running server; check compares an answer with transformers'."""
    kind, args, count = SERVERS[request.param]
    if kind == "dsa" and not release.exists(launch.SPLITS_ROWS_OF_INDEXED):
        pytest.skip("this release does not split the tokens of models with an indexer")
    env = {**parity.EXACT, **parity.CORES, **cpu_dcp.environment(tmp_path_factory.mktemp("dcp"))}
    with start_server(models[kind], ("--dtype=float32", "--tp=2", "--dcp-size=2", *args), env) as server:
        prompts = parity.PROMPTS[:count]
        asked = [*prompts, *parity.PREFIXED]
        reference.learn(kind, asked, [parity._ask(server, p)["output_ids"] for p in asked])

        def check(prompt: list[int], answer: dict[str, Any]) -> None:
            expected = reference(kind, prompt)
            assert answer["output_ids"] == expected["tokens"]
            logprobs = [row[0] for row in answer["meta_info"]["output_token_logprobs"]]
            assert max(abs(a - b) for a, b in zip(logprobs, expected["logprobs"], strict=True)) < parity.LOGPROB_BAR

        yield server, prompts, check


def test_prompts_at_once_and_behind_a_prefix_in_the_cache(served):
    server, prompts, check = served
    parity._forget_prefixes(server)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: parity._ask(server, prompt), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["meta_info"]["cached_tokens"] == 0
        check(prompt, answer)
    first, second = (parity._ask(server, prompt) for prompt in parity.PREFIXED)
    assert second["meta_info"]["cached_tokens"] >= len(parity.SHARED)
    check(parity.PREFIXED[0], first)
    check(parity.PREFIXED[1], second)
