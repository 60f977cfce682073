"""The GPU backends through real servers, beside stock SGLang: run on a GPU host with `make test-gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import tiny_tasks
from tests.engine.conftest import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

MODEL_2K = ROOT / "examples" / "models" / "tiny-dsa-2k"
PROMPT_TOKENS = (3000, 6000)
#: Batches beyond the captured sizes run eagerly, those between them padded: both must be right.
SERVER = ("--cuda-graph-bs-decode", "1", "4", "16", "--max-running-requests=32", "--mem-fraction-static=0.5")
SERVER = (*SERVER, "--cuda-graph-backend-prefill=disabled", "--sampling-backend=pytorch", "--grammar-backend=none")


def gsm8k(folder: Path, *arguments: str) -> dict:
    """Report of the finished command; its exit code 0 says that every arm is right and none differs."""
    command = [sys.executable, "-m", "nsa_backend_plugin.cli", "gsm8k", f"--model-path={MODEL_2K}", "--num-shots=0"]
    command += ["--max-tokens=64", "--min-accuracy=0.95", f"--out={folder / 'out'}", *arguments, "--", *SERVER]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads((folder / "out" / "report.json").read_text())


@pytest.mark.parametrize("kv", ["auto", "fp8_e4m3"])
def test_long_prompts_are_answered_as_by_stock(kv: str, tmp_path: Path) -> None:
    """Prompts longer than index_topk: the indexer, top-k and sparse attention decide what the model sees."""
    parts = []
    for kind in ("arithmetic", tiny_tasks.data.RECALL):
        tiny_tasks.write_long(tmp_path / kind, kind, 40, PROMPT_TOKENS, seed=1)
        parts.append((tmp_path / kind).read_text())
    (tmp_path / "tasks.jsonl").write_text("".join(parts))
    dtype = [f"--kv-cache-dtype={kv}"] if kv != "auto" else []
    arms = [" ".join([arm, *dtype]) for arm in ("nsa_plugin", "nsa_plugin NSA_PLUGIN_DUAL_STREAM=0", "dsa")]
    report = gsm8k(tmp_path, f"--data-path={tmp_path / 'tasks.jsonl'}", "--concurrency=32", "--arms", *arms)
    assert [arm["accuracy"]["total"] for arm in report["arms"]] == [80, 80, 80]
    for arm in report["arms"][1:]:
        assert arm["versus_first"]["agreement"] >= 0.95
        assert arm["versus_first"]["logprob_difference"] < 0.05
