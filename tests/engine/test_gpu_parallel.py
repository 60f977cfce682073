"""Tensor, data and context parallelism of attention give the answers of one GPU: run on a host with two GPUs.

python -m pytest -m gpu tests/engine/test_gpu_parallel.py

With `-k tasks` dense layers alone, with `-k experts` layers of experts that are parallel too, and drafts, with
`-k split_prefill` a prefill that is split over the GPUs, with `-k split_cache` a cache whose tokens are. Of experts and
a split cache, servers that no chosen test asks (`-k "split_cache and dsa and fp8"`) are not started.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_backend_plugin.accuracy.ask import Answer, answer_all
from nsa_backend_plugin.accuracy.compare import compare
from nsa_backend_plugin.accuracy.questions import load_items
from nsa_backend_plugin.engine import launch, release
from tests.engine import drafting, tiny_tasks
from tests.engine.drafting import Arm, at_once, chosen, file_name, result, same_share
from tests.engine.test_gpu import COMMON, EAGER_PREFILL, MODEL_2K, PROMPT_TOKENS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

ARMS = {"one": ["--tp=1"], "tp2": ["--tp=2"], "dp2": ["--tp=2", "--dp=2", "--enable-dp-attention"]}
ARGS = (
    *COMMON,
    EAGER_PREFILL,
    "--attention-backend=nsa_plugin",
    "--kv-cache-dtype=fp8_e4m3",
    "--mem-fraction-static=0.95",
    "--max-total-tokens=300000",
    "--max-running-requests=32",
    *("--cuda-graph-bs-decode", "1", "4", "16"),
    # SGLang turns it on for these models: FlashInfer then compiles its kernel for minutes at the first start.
    "--enforce-disable-flashinfer-allreduce-fusion",
)


def _ask(arms: dict[str, list[str]], folder: Path, model: Path = MODEL_2K) -> dict[Any, Any]:
    """Answers of every arm to the same long prompts, or its error: some one at a time, when a data-parallel rank idles.

    "..., again" has those of a second time, when all but the last page of a prompt is in the cache.
    """
    tiny_tasks.write_long(folder / "tasks.jsonl", tiny_tasks.data.RECALL, 60, PROMPT_TOKENS, seed=2)
    items = load_items(folder / "tasks.jsonl", 0, None)

    def run(arm: str, _gpu: int) -> dict[str, list[Answer]]:
        args, log, found = arms[arm], folder / f"{file_name(arm)}.log", {}
        with drafting.served(model, [*ARGS, *args], log) as server:
            for label, part, concurrency in ((arm, items[:4], 1), (arm, items, 32), (f"{arm}{AGAIN}", items, 8)):
                found[label], _ = answer_all(
                    server.url,
                    part,
                    folder / file_name(label) / "answers.jsonl",
                    label=label,
                    concurrency=concurrency,
                    max_tokens=64,
                    timeout=120,
                )
        assert ("Enabled DSA context parallel" in log.read_text()) == ("--enable-prefill-cp" in args)
        assert ("DCP enabled, dcp_size=2" in log.read_text()) == ("--dcp-size=2" in args)
        return found

    return at_once({arm: partial(run, arm) for arm in arms})


AGAIN = ", again"


def _answers(found: dict[Any, Any], label: str) -> list[Answer]:
    """Of `_ask`; the arm's error is raised."""
    return result(found, label.removesuffix(AGAIN))[label]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return _ask(ARMS, tmp_path_factory.mktemp("parallel"))


@pytest.mark.parametrize("arm", ["tp2", "dp2"])
def test_two_gpus_answer_tasks_as_one(arm: str, tasks: dict[Any, Any]) -> None:
    one, two = _answers(tasks, "one"), _answers(tasks, arm)
    versus = compare(one, two)
    print(arm, sum(a.correct for a in two), sum(a.correct for a in one), versus)
    assert sum(a.correct for a in one) >= 0.95 * len(one)
    assert versus.agreement >= 0.98
    assert versus.logprob_difference is not None
    assert versus.logprob_difference < 0.05


#: Prefill over two GPUs, of whole prompts, several to a batch, and in chunks that lie behind others.
SPLIT = ["--tp=2", "--attn-cp-size=2", "--enable-prefill-cp", "--cp-strategy=interleave"]
SPLIT_ARMS = {
    "one": ["--tp=1"],
    "split": SPLIT,
    "split in chunks": [*SPLIT, "--chunked-prefill-size=1024"],
    "split, stock": [*SPLIT, "--attention-backend=dsa"],
}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return _ask(SPLIT_ARMS, tmp_path_factory.mktemp("split"))


@pytest.mark.parametrize("arm", ["split", "split in chunks", "split, again", "split in chunks, again"])
def test_a_split_prefill_answers_as_one_gpu(arm: str, split: dict[Any, Any]) -> None:
    again = AGAIN * arm.endswith(AGAIN)
    ours, one, stock = (_answers(split, label) for label in (arm, f"one{again}", f"split, stock{again}"))
    versus, beside = compare(one, ours), compare(one, stock)
    print(arm, *(sum(a.correct for a in answers) for answers in (ours, one, stock)), versus, beside)
    assert sum(a.correct for a in one) >= 0.95 * len(one)
    assert versus.agreement >= 0.98
    assert versus.agreement >= beside.agreement - 0.02
    assert versus.logprob_difference is not None
    assert versus.logprob_difference < 0.05


#: A cache whose tokens are split: of whole prompts, in chunks behind others, and by SGLang's other exchange.
DCP = ["--tp=2", "--dcp-size=2"]
DCP_ARGS = {
    "one": ["--tp=1"],
    "dcp": DCP,
    "dcp in chunks": [*DCP, "--chunked-prefill-size=1024", "--page-size=64"],
    "dcp, ag_rs": [*DCP, "--dcp-comm-backend=ag_rs"],
}
ROWS = {"": "fp8_e4m3", "bf16, ": "bfloat16"}
DCP_ARMS = {
    f"{rows}{arm}": [*DCP_ARGS[arm], f"--kv-cache-dtype={ROWS[rows]}"]
    for rows, arm in itertools.product(ROWS, DCP_ARGS)
}


@pytest.fixture(scope="module", params=["dsa", "mla"])
def split_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("split-cache")
    if request.param == "dsa" and not release.exists(launch.SPLITS_ROWS_OF_INDEXED):
        pytest.skip("this release does not split the tokens of models with an indexer")
    names = itertools.product(chosen(request, "rows"), ["one", *chosen(request, "arm")])
    arms = {f"{rows}{arm}": DCP_ARMS[f"{rows}{arm}"] for rows, arm in names}
    model = drafting.without_indexer(MODEL_2K, folder / "model") if request.param == "mla" else MODEL_2K
    return _ask(arms, folder, model)


@pytest.mark.parametrize("again", ["", AGAIN], ids=["first", "again"])
@pytest.mark.parametrize("arm", [arm for arm in DCP_ARGS if arm != "one"])
@pytest.mark.parametrize("rows", ROWS, ids=ROWS.get)
def test_a_split_cache_answers_as_one_gpu(rows: str, arm: str, again: str, split_cache: dict[Any, Any]) -> None:
    ours, one = (_answers(split_cache, f"{rows}{name}{again}") for name in (arm, "one"))
    versus = compare(one, ours)
    print(rows, arm, again, sum(a.correct for a in ours), sum(a.correct for a in one), versus)
    assert sum(a.correct for a in one) >= 0.95 * len(one), "answers to guess at would agree by chance"
    assert versus.agreement >= 0.98
    assert versus.logprob_difference is not None
    assert versus.logprob_difference < 0.05


#: Experts and attention over two GPUs, which get prompts of all lengths: one at a time, when a rank idles, and all at
#: once, unlike numbers to each, in padded graphs and beyond those eagerly.
DP = ("--tp=2", "--dp=2", "--enable-dp-attention", "--ep-size=2")
DP += ("--enforce-disable-flashinfer-allreduce-fusion",)
EXPERTS = {
    "one": Arm(0, kind="moe"),
    "dp2": Arm(0, kind="moe", args=DP),
    "dp2, 1 step": Arm(1, kind="moe", args=DP),
    "dp2, 3 steps": Arm(3, kind="moe", args=DP),
    "dp2, stock": Arm(0, kind="moe", backend="dsa", args=DP),
    "dp2, 1 step, stock": Arm(1, kind="moe", backend="dsa", args=DP),
    "dp2, 3 steps, stock": Arm(3, kind="moe", backend="dsa", args=DP),
}


@pytest.fixture(scope="module")
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("experts")
    models, texts = drafting.write_models(folder), drafting.prompts(folder)

    def run(name: str, _gpu: int) -> drafting.Outcome:
        arm = EXPERTS[name]
        return drafting.serve(models[arm.kind], folder / f"{file_name(name)}.log", arm, texts)

    names = ["one", *(f"{name}{of}" for name in chosen(request, "name") for of in ("", ", stock"))]
    return at_once({name: partial(run, name) for name in names})


@pytest.mark.parametrize("name", [name for name in EXPERTS if f"{name}, stock" in EXPERTS])
def test_experts_and_drafts_on_two_gpus_answer_as_one(experts: dict[Any, Any], name: str) -> None:
    ours, stock = result(experts, name), result(experts, f"{name}, stock")
    print(name, same_share(result(experts, "one"), ours), same_share(stock, ours), ours.per_step(), stock.per_step())
    assert same_share(result(experts, "one"), ours) >= 0.9
    assert same_share(stock, ours) >= 0.9
    if EXPERTS[name].steps:
        assert ours.per_step() > 1.3, "the draft layer's guesses are hardly ever right: this shows nothing"
        assert ours.per_step() == pytest.approx(stock.per_step(), rel=0.05)
