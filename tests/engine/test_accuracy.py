"""The tiny DSA model through `nsa-plugin gsm8k`, as a user runs it: right answers, and two arms that agree.

On a CPU torch implementations win by themselves; the second arm forces them, has another byte layout of the index-K
pages, and serves the same weights exported as GlmMoeDsa, which are the same function of the input. The score says
whether serving computes the model correctly; it is no GSM8K accuracy.

Every run asks fresh held-out problems; a failing one prints the seed, NSA_TEST_SEED repeats it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_backend_plugin.serving import CPU_ARGS
from tests.engine import tiny_tasks
from tests.engine.conftest import ROOT, SERVER_ENV, run_python

pytestmark = pytest.mark.engine

PREFIXES, PER_PREFIX, RECALLS = 10, 10, 20  # the prefix cache saves a third of the prefill
PROBLEMS = PREFIXES * PER_PREFIX
FORCED = " ".join(f"NSA_PLUGIN_{name}_IMPL=torch" for name in ("MQA_LOGITS", "TOPK", "SPARSE_MLA"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, forked) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The finished command and its --out folder."""
    folder = tmp_path_factory.mktemp("accuracy")
    seed = int(os.environ.get("NSA_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"problems of NSA_TEST_SEED={seed}")
    tiny_tasks.write_arithmetic(folder / "arithmetic.jsonl", PREFIXES, PER_PREFIX, shots=2, seed=seed)
    tiny_tasks.write_recall(folder / "recall.jsonl", RECALLS, tokens=350, seed=seed)
    data = folder / "tasks.jsonl"
    data.write_text("".join((folder / f"{name}.jsonl").read_text() for name in ("arithmetic", "recall")))
    export = ROOT / "examples" / "tiny_dsa" / "export.py"
    run_python(export, "--folder", tiny_tasks.MODEL, "--arch", "glm", "--out", folder / "glm")
    second = f"nsa_plugin {FORCED} NSA_PLUGIN_INDEX_LAYOUT=preshuffled --model-path={folder / 'glm'}"
    server_args = [arg for arg in CPU_ARGS if not arg.startswith("--attention-backend")]
    # Larger batches than the tests' default: a step costs about the same.
    server_args += ["--max-running-requests=16", "--max-total-tokens=16384"]
    command = [sys.executable, "-m", "nsa_backend_plugin.cli", "gsm8k", f"--model-path={tiny_tasks.MODEL}"]
    command += [f"--data-path={data}", "--num-shots=0", "--concurrency=16", "--max-tokens=64", "--min-accuracy=0.95"]
    command += [f"--out={folder / 'out'}", "--arms", "nsa_plugin", second, "--", *server_args]
    env = forked({**os.environ, **SERVER_ENV})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    return done, folder / "out"


def test_questions_are_held_out(finished):
    """Every operation and memo that is asked for is on the test side; every worked example is on the other one."""
    _, out = finished
    operation, memo = re.compile(r"<<(\d+)[+-](\d+)="), re.compile(r"Memo: (\w+): (\d+)")
    rows = [json.loads(line) for line in (out.parent / "tasks.jsonl").read_text().splitlines()]
    assert len({(row["context"], row["question"]) for row in rows}) == PROBLEMS + RECALLS
    for number, row in enumerate(rows):
        asked, shown = (operation.findall(row[part]) for part in ("answer", "context"))
        memos = memo.findall(row["context"])
        assert shown
        assert (bool(asked), bool(memos)) == ((True, False) if number < PROBLEMS else (False, True))
        assert all(tiny_tasks.data.is_test_pair(int(a), int(b)) for a, b in asked)
        assert all(tiny_tasks.data.is_test_memo(name, int(code)) for name, code in memos)
        assert not any(tiny_tasks.data.is_test_pair(int(a), int(b)) for a, b in shown)


def test_the_command_finds_no_difference(finished):
    done, _ = finished
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "do not differ by more than chance" in done.stdout


@pytest.mark.parametrize("arm", [0, 1], ids=["default", "torch_preshuffled_glm"])
def test_accuracy(finished, arm):
    done, out = finished
    assert done.returncode == 0, done.stderr[-2000:]
    folder = sorted((path.parent for path in out.glob("*/answers.jsonl")), key=lambda path: len(path.name))[arm]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    right = {int(answer["key"].rsplit(":", 1)[1]): answer["correct"] for answer in answers}
    assert len(right) == PROBLEMS + RECALLS
    arithmetic = sum(right[row] for row in range(1, PROBLEMS + 1))
    recall = sum(right[row] for row in range(PROBLEMS + 1, PROBLEMS + RECALLS + 1))
    print(f"{folder.name}: {arithmetic} of {PROBLEMS} problems, {recall} of {RECALLS} recalls right")
    assert arithmetic >= 0.95 * PROBLEMS
    assert recall == RECALLS


def test_arms_agree_and_report_what_ran(finished):
    _, out = finished
    report = json.loads((out / "report.json").read_text())
    (pair,) = report["pairs"]
    assert pair["completion"]["agreement"] >= 0.99
    assert pair["completion"]["logprob_difference"] < 1e-3
    for arm, model in zip(report["arms"], (tiny_tasks.MODEL, out.parent / "glm"), strict=True):
        assert arm["server"]["model_path"] == str(model)
        assert any(line.startswith("topk.select: torch") for line in arm["kernels"])
        assert "--attention-backend=nsa_plugin" in arm["command"]
        assert arm["device"].startswith("cpu")
        assert arm["server"]["attention_backend"] == "nsa_plugin"
    assert report["versions"]["sglang"] == report["arms"][0]["server"]["version"]
    assert report["versions"]["torch"]
    assert report["command"].startswith("nsa-plugin gsm8k --model-path=")
