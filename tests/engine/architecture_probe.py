"""Greedy tokens of tiny models by SGLang in process, and transformers' beside them.

    python -m tests.engine.architecture_probe FOLDER NAME ...

NAMES are of `tiny_architectures.CASES`. Prints one JSON line: {name: {"error"} or {"answers", "expected", "other"}}.
The last three have {"tokens", "logprobs"} of every prompt; "other" is transformers' first token of a prompt that begins
otherwise. Every case is a fork of this process, which imported SGLang once; what it writes goes to FOLDER/NAME/log.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang.srt.plugins import load_plugins

load_plugins()

import sglang.benchmark.one_batch  # noqa: E402
import sglang.srt.models.registry  # noqa: E402, F401  (imports every model, once for all cases)
from sglang.srt.arg_groups.overrides import MODEL_OVERRIDES  # noqa: E402

from nsa_backend_plugin import serving  # noqa: E402
from nsa_backend_plugin.engine.layer_profile import load  # noqa: E402
from tests.engine.greedy_reference import continue_greedily  # noqa: E402
from tests.engine.tiny_architectures import CASES  # noqa: E402

#: Longer than `index_topk`; while they are continued each begins a page.
LENGTHS = (190, 61)
TOKENS = 8
BEGINNING = 32


def answers(model: Path, prompts: list[list[int]]) -> list[dict[str, list]]:
    """Both prompts prefilled as one batch, then decoded as one."""
    one_batch, engine, _ = load([f"--model-path={model}", *serving.CPU_ARGS, "--dtype=float32", "--page-size=64"])
    requests = one_batch.prepare_synthetic_inputs_for_latency_test(len(prompts), 0, prompts)
    out: list[dict[str, list]] = [{"tokens": [], "logprobs": []} for _ in prompts]
    tokens, logits, batch = engine.extend(requests)
    for step in range(TOKENS):
        if step:
            tokens, logits = engine.decode(tokens, batch)
        best = logits.float().log_softmax(-1).max(-1)
        for row, token, logprob in zip(out, best.indices.tolist(), best.values.tolist(), strict=True):
            row["tokens"].append(token)
            row["logprobs"].append(logprob)
    return out


@torch.no_grad()
def run(name: str, folder: Path) -> dict[str, Any]:
    generator = random.Random(1)
    prompts = [[generator.randrange(5, 500) for _ in range(length)] for length in LENGTHS]
    path, model = CASES[name].write(folder)
    # SGLang runs Mistral-Large-3 in bfloat16 whatever --dtype says; 0.5.17 makes a CUDA stream for LongCat-Flash.
    with mock.patch.dict(MODEL_OVERRIDES, clear=True), mock.patch.object(torch.cuda, "Stream", return_value=None):
        got = answers(path, prompts)
    expected = [continue_greedily(model, p, a["tokens"]) for p, a in zip(prompts, got, strict=True)]
    others = [prompt[:BEGINNING][::-1] + prompt[BEGINNING:] for prompt in prompts]
    other = [continue_greedily(model, p, a["tokens"][:1]) for p, a in zip(others, got, strict=True)]
    return {"answers": got, "expected": expected, "other": other}


def in_a_fork(name: str, folder: Path) -> dict[str, Any]:
    """SGLang's process-wide state allows one model per process."""
    folder.mkdir(parents=True)
    child = os.fork()
    if not child:
        log = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            result = run(name, folder)
        except BaseException:
            result = {"error": traceback.format_exc()}
        (folder / "result.json").write_text(json.dumps(result))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        return {"error": f"exit status {status}: {(folder / 'log').read_text()[-4000:]}"}
    return dict(json.loads((folder / "result.json").read_text()))


def main() -> None:
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    print("\n" + json.dumps({name: in_a_fork(name, Path(folder) / name) for name in names}))


if __name__ == "__main__":
    main()
