"""Tensor-parallel and data-parallel attention give the answers of one GPU: run on a host with two GPUs.

python -m pytest -m gpu tests/engine/test_gpu_parallel.py
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nsa_backend_plugin.accuracy.ask import Answer, answer_all
from nsa_backend_plugin.accuracy.compare import compare
from nsa_backend_plugin.accuracy.questions import load_items
from nsa_backend_plugin.serving import Server
from tests.engine import tiny_tasks
from tests.engine.test_gpu import COMMON, MODEL_2K, PROMPT_TOKENS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

#: Port and arguments. SGLang takes further ports above the one given.
ARMS = {
    "one": (21000, ["--tp=1"]),
    "tp2": (24000, ["--tp=2"]),
    "dp2": (27000, ["--tp=2", "--dp=2", "--enable-dp-attention"]),
}
ARGS = (
    *COMMON,
    "--attention-backend=nsa_plugin",
    "--kv-cache-dtype=fp8_e4m3",
    "--mem-fraction-static=0.95",
    "--max-total-tokens=300000",
    "--max-running-requests=32",
    *("--cuda-graph-bs-decode", "1", "4", "16"),
    # SGLang turns it on for these models: FlashInfer then compiles its kernel for minutes at the first start.
    "--enforce-disable-flashinfer-allreduce-fusion",
)
#: The servers share the GPUs, so that their free memory differs.
ENV = {"TRITON_INTERPRET": "0", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Answer]]:
    """Answers of every arm to the same long prompts: some one at a time, when a data-parallel rank idles."""
    folder = tmp_path_factory.mktemp("parallel")
    tiny_tasks.write_long(folder / "tasks.jsonl", tiny_tasks.data.RECALL, 60, PROMPT_TOKENS, seed=2)
    items = load_items(folder / "tasks.jsonl", 0, None)

    def run(arm: str) -> list[Answer]:
        port, args = ARMS[arm]
        log = folder / f"{arm}.log"
        with Server(MODEL_2K, [*args, *ARGS], ENV, port=port, log_path=log, timeout=180) as server:
            for part, concurrency in ((items[:4], 1), (items, 32)):
                found, _ = answer_all(
                    server.url,
                    part,
                    folder / arm / "answers.jsonl",
                    label=arm,
                    concurrency=concurrency,
                    max_tokens=64,
                    timeout=120,
                )
        return found

    with ThreadPoolExecutor(len(ARMS)) as pool:
        return dict(zip(ARMS, pool.map(run, ARMS), strict=True))


@pytest.mark.parametrize("arm", ["tp2", "dp2"])
def test_two_gpus_answer_as_one(arm: str, answers: dict[str, list[Answer]]) -> None:
    one = answers["one"]
    versus = compare(one, answers[arm])
    print(arm, sum(a.correct for a in answers[arm]), sum(a.correct for a in one), versus)
    assert sum(a.correct for a in one) >= 0.95 * len(one)
    assert versus.agreement >= 0.98
    assert versus.logprob_difference is not None
    assert versus.logprob_difference < 0.05
