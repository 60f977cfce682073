"""Every architecture that is served gives transformers' greedy tokens and log-probabilities, with random weights."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from packaging.version import Version

from nsa_backend_plugin.engine import arguments
from tests.engine.conftest import run_python
from tests.engine.tiny_architectures import CASES

sglang = pytest.importorskip("sglang", reason="needs SGLang")

pytestmark = pytest.mark.engine

LOGPROB_BAR = 1e-3
#: tests/engine/test_parity.py and test_speculative_gpu.py show these.
ELSEWHERE = {"DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"}
ELSEWHERE |= {"DeepseekV3ForCausalLMNextN", "GlmMoeDsaForCausalLMNextN"}
#: Name -> (the last release that cannot serve it, the error that a launch ends with there).
REFUSED = {
    "GLM-5.2 by types": ("0.5.19", "ValueError: GlmMoeDsaForCausalLM has indexer_types .* SGLang 0.5.1[789] reads as")
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Outcome of every case, from one process and its forks. Nothing is compiled: that costs more than it runs."""
    env = {"NSA_PLUGIN_CPU": "1", "NSA_PLUGIN_EXACT": "1", "TORCHDYNAMO_DISABLE": "1"}
    folder = tmp_path_factory.mktemp("architectures")
    output = run_python("tests.engine.architecture_probe", folder, *CASES, env=env)
    return dict(json.loads(output.splitlines()[-1]))


@pytest.mark.parametrize("name", CASES)
def test_answers_are_transformers(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome = outcomes[name]
    last, refusal = REFUSED.get(name, ("0", ""))
    if Version(sglang.__version__) <= Version(last):
        assert re.search(refusal, outcome["error"]), outcome
        return
    assert "answers" in outcome, outcome["error"]
    pairs = zip(outcome["expected"], outcome["other"], strict=True)
    differences = [abs(expected["logprobs"][0] - other["logprobs"][0]) for expected, other in pairs]
    assert max(differences) > 50 * LOGPROB_BAR, "the model ignores its context: the comparison shows nothing"
    for got, expected in zip(outcome["answers"], outcome["expected"], strict=True):
        assert got["tokens"] == expected["tokens"]
        assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=LOGPROB_BAR)


def test_every_architecture_that_is_served_has_a_case() -> None:
    served = {name for name, reason in arguments.ARCHITECTURES.items() if not reason}
    assert served - ELSEWHERE == {case.architecture for case in CASES.values()} - ELSEWHERE
