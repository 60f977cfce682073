"""A server that keeps an MLA model's rows in fp8: its log-probabilities are transformers' over the same rounding."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_backend_plugin.engine import factory
from tests.engine.conftest import HERE, run_python
from tests.engine.prompts import NEW_TOKENS, answer
from tests.engine.test_parity import CHUNKED, PREFIXED, PROMPTS, SHARED, _ask, _forget_prefixes

pytest.importorskip("sglang", reason="needs SGLang")

pytestmark = pytest.mark.engine

#: A value on the edge of two fp8 numbers falls to either, by how its float32 sums were ordered: 8e-3 was seen. Where
#: that moves a token to another expert, 0.5.
LOGPROB_BAR = 2e-2


@pytest.fixture(scope="module")
def served(models, start_server) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """(answers by how they were asked for, log of the server)."""
    arguments = ("--dtype=float32", "--kv-cache-dtype=fp8_e4m3", "--page-size=16", *CHUNKED)
    with start_server(models["mla"], arguments) as server:
        alone = [_ask(server, prompt) for prompt in PROMPTS]
        _forget_prefixes(server)
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = list(pool.map(lambda prompt: _ask(server, prompt), PROMPTS))
        _forget_prefixes(server)
        prefixed = [_ask(server, prompt) for prompt in PREFIXED]
        log = server.log_path.read_text()
    return {"alone": alone, "together": together, "prefixed": prefixed}, log


@pytest.fixture(scope="module")
def far(models, served, tmp_path_factory) -> dict[tuple[str, str], float]:
    """(how it was asked for, rows of the reference) -> share of new tokens that miss the bar."""
    folder: Path = tmp_path_factory.mktemp("scores")
    answers = [(way, p, a) for way, found in served[0].items() for p, a in zip(_prompts(way), found, strict=True)]
    (folder / "texts.json").write_text(json.dumps([p + a["output_ids"] for _, p, a in answers]))
    found: dict[tuple[str, str], list[bool]] = {}
    run_python(HERE / "score_reference.py", models["mla"], folder / "texts.json", folder / "scores.json", "fp8")
    for rows, scores in zip(("float32", "fp8"), json.loads((folder / "scores.json").read_text()), strict=True):
        for (way, _, reply), expected in zip(answers, scores, strict=True):
            logprobs = answer(reply)["logprobs"]
            assert len(logprobs) == NEW_TOKENS
            misses = [abs(a - b) >= LOGPROB_BAR for a, b in zip(logprobs, expected[-NEW_TOKENS:], strict=True)]
            found.setdefault((way, rows), []).extend(misses)
    return {key: sum(misses) / len(misses) for key, misses in found.items()}


def _prompts(way: str) -> list[list[int]]:
    return PREFIXED if way == "prefixed" else PROMPTS


@pytest.mark.parametrize("way", ["alone", "together", "prefixed"])
def test_answers_are_those_of_rounded_rows(far: dict[tuple[str, str], float], way: str) -> None:
    assert far[way, "fp8"] <= 0.05
    assert far[way, "float32"] > 0.5, "the comparison shows nothing"


def test_a_prefix_comes_from_the_cache(served) -> None:
    assert served[0]["prefixed"][1]["meta_info"]["cached_tokens"] >= len(SHARED)


def test_the_report_names_the_rows(served) -> None:
    line = next(line for line in served[1].splitlines() if "nsa_plugin op dense_mla.decode: torch for " in line)
    assert "float8_e4m3fn" in line


def test_exact_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a server makes its backend; test_refusals shows what becomes of a server there."""
    monkeypatch.setenv("NSA_PLUGIN_EXACT", "1")
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepseekV3ForCausalLM"]))
    runner = SimpleNamespace(model_config=model, kv_cache_dtype=torch.float8_e4m3fn, dtype=torch.float32)
    with pytest.raises(ValueError, match="fp8_e4m3 with NSA_PLUGIN_EXACT=1: its caches are not quantized"):
        factory._cpu_backend(runner)
