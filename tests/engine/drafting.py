"""Small models with a draft layer, servers of them, and what the servers answer: shared by the GPU tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsa_backend_plugin import serving
from tests.engine import tiny_tasks
from tests.engine.conftest import ROOT, run_python

# `tiny_tasks` makes the example's modules importable.
import export  # isort: skip

MODEL_2K = ROOT / "examples" / "models" / "tiny-dsa-2k"
#: Batches beyond the captured sizes run eagerly, those between them padded.
ARGS = ["--cuda-graph-bs-decode", "1", "4", "8", "--max-running-requests=24", "--max-total-tokens=120000"]
ARGS += ["--cuda-graph-backend-prefill=disabled", "--sampling-backend=pytorch", "--grammar-backend=none"]
ARGS += ["--mem-fraction-static=0.9"]
#: The tests' interpreter of Triton must not reach SGLang. Servers share a GPU, whose free memory changes.
ENV = {"TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
#: Prompts of `prompts`: the first are of a few hundred tokens, those behind them longer than index_topk.
SHORT, LONG = 24, 8
#: Each part of them, and by what share its tokens a step may differ: rounding turns some choices that are near ties.
ACCEPTANCE_BARS = ((slice(SHORT), 0.05), (slice(SHORT, SHORT + LONG), 0.1))
#: Layer 1 takes the top-k of layer 0, and each step of a draft what its extend selected.
INDEX_SHARE = {"index_topk_pattern": "FSF", "index_share_for_mtp_iteration": True}

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """A server. kind: of `write_models`. steps: of the draft, 0 = none."""

    steps: int
    kv: str = "fp8_e4m3"
    kind: str = "dsa"
    backend: str = "nsa_plugin"
    args: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        args = [f"--attention-backend={self.backend}", f"--kv-cache-dtype={self.kv}", *ARGS, *self.args]
        if self.steps:
            args += ["--speculative-algorithm=NEXTN", f"--speculative-num-steps={self.steps}"]
            args += ["--speculative-eagle-topk=1", f"--speculative-num-draft-tokens={self.steps + 1}"]
        return args

    def on(self, gpu: int) -> Arm:
        return replace(self, args=(*self.args, f"--base-gpu-id={gpu}"))


@dataclass
class Outcome:
    """Of each answer: its tokens, and how many verifications of drafts they took (0: without drafts)."""

    tokens: list[list[int]]
    verified: list[int]

    def per_step(self, part: slice = slice(None)) -> float:
        """Mean number of tokens that one verification yields: the acceptance length."""
        return sum(map(len, self.tokens[part])) / max(sum(self.verified[part]), 1)


def same_share(one: Outcome, other: Outcome) -> float:
    """Share of answers that are equal."""
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True)) / len(one.tokens)


def train(folder: Path) -> Path:
    """tiny-dsa-2k with a next-token layer: what NSA_TEST_DRAFT_MODEL names, or one that is trained now, for minutes."""
    known = os.environ.get("NSA_TEST_DRAFT_MODEL")
    if known:
        return Path(known)
    script = ROOT / "examples" / "tiny_dsa" / "draft_layer.py"
    threads = {"OMP_NUM_THREADS": str(min(8, os.cpu_count() or 1))}
    run_python(script, "--folder", MODEL_2K, "--out", folder, env=threads)
    return folder


def write_models(folder: Path) -> dict[str, Path]:
    """Folders by kind: "dsa", and models that are the same function, or nearly.

    "mla" has no indexer. "glm" is GLM-5.2's architecture with `INDEX_SHARE`. "moe" has experts in every layer.
    """
    dsa = train(folder / "dsa")
    glm = {**export.ARCHITECTURES["glm"], **INDEX_SHARE}
    return {
        "dsa": dsa,
        "mla": without_indexer(dsa, folder / "mla"),
        "glm": variant(dsa, folder / "glm", glm, lambda weights: export.interleave_indexer_rope(weights, 64, 128)),
        "moe": variant(dsa, folder / "moe", {"first_k_dense_replace": 0}, with_experts),
    }


def variant(model: Path, out: Path, changes: Mapping[str, Any], change: Callable[[Weights], Weights]) -> Path:
    """A copy of a model with other weights and other entries of its configuration; None removes one."""
    shutil.copytree(model, out)
    weights = change(load_file(model / "model.safetensors"))
    save_file({name: w.contiguous() for name, w in weights.items()}, out / "model.safetensors", {"format": "pt"})
    config = {**json.loads((model / "config.json").read_text()), **changes}
    (out / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return out


def without_indexer(model: Path, out: Path) -> Path:
    """A copy of a model that attends to everything."""
    changes = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    changes |= dict.fromkeys(("index_topk", "index_n_heads", "index_head_dim"))
    return variant(model, out, changes, lambda weights: {n: w for n, w in weights.items() if "indexer" not in n})


def with_experts(weights: Weights, experts: int = 8) -> Weights:
    """Every layer's MLP as routed experts that are all the same: an answer is right when each was asked and none lost.

    A router that spreads the tokens chooses among them; the shared expert adds nothing.
    """
    hidden = weights["model.embed_tokens.weight"].shape[1]
    generator = torch.Generator().manual_seed(0)
    out = {name: weight for name, weight in weights.items() if ".mlp." not in name}
    layers = {name.split(".mlp.")[0] for name in weights if ".mlp." in name}
    for layer in sorted(layers):
        gate = torch.randn(experts, hidden, generator=generator)
        out[f"{layer}.mlp.gate.weight"] = gate.to(torch.bfloat16)
        out[f"{layer}.mlp.gate.e_score_correction_bias"] = torch.zeros(experts)
        for part in ("gate_proj", "up_proj", "down_proj"):
            dense = weights.get(f"{layer}.mlp.{part}.weight")
            whole = weights[f"{layer}.mlp.shared_experts.{part}.weight"] if dense is None else dense
            out[f"{layer}.mlp.shared_experts.{part}.weight"] = torch.zeros_like(whole)
            for expert in range(experts):
                out[f"{layer}.mlp.experts.{expert}.{part}.weight"] = whole.clone()
    return out


def prompts(folder: Path) -> list[str]:
    """`SHORT` of a few hundred tokens and `LONG` longer than index_topk."""
    tiny_tasks.write_arithmetic(folder / "short", SHORT // 6, 6, shots=3, seed=1)
    tiny_tasks.write_long(folder / "long", "arithmetic", LONG, (2500, 5000), seed=1)
    rows = [json.loads(line) for name in ("short", "long") for line in (folder / name).read_text().splitlines()]
    return [row["context"] + row["question"] for row in rows]


def body(prompt: str, **extra: Any) -> dict[str, Any]:
    # Up to the answer's end: the next question is the model's own invention, all of it nearly a tie.
    return {
        "text": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": 48, "stop": ["Question"]},
        **extra,
    }


def heard(ask: Callable[[dict[str, Any]], Any], texts: list[str]) -> Outcome:
    """Answers to three prompts alone, then to the others together. ask: the parsed answer to a body."""
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = [ask(body(text)) for text in texts[:3]]
        answers += pool.map(lambda text: ask(body(text)), texts[3:])
    verified = [answer["meta_info"].get("spec_verify_ct", 0) for answer in answers]
    return Outcome([answer["output_ids"] for answer in answers], verified)


def file_name(name: str) -> str:
    """Of an arm: a file of another name does not come back from a GPU's host."""
    return name.replace(",", "").replace(" ", "-")


def said(log: Path) -> str:
    """The first traceback of a server's log, or what begins its scheduler's end, and the log's last lines."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    marks = ("hit an exception", "Traceback")
    first = next((n for mark in marks for n, line in enumerate(lines) if mark in line), len(lines))
    shown = [*range(first, min(first + 60, len(lines)))]
    shown += range(max(len(lines) - 40, *(n + 1 for n in shown[-1:]), 0), len(lines))
    return "\n".join([f"of {log}:", *(lines[n][:400] for n in shown)])


@contextlib.contextmanager
def explained_by(*logs: Path) -> Iterator[None]:
    """An error in the block tells what the servers' logs say: a GPU's host is gone when somebody reads of it."""
    try:
        yield
    except serving.ServerError as error:  # which ends with the last lines
        raise RuntimeError("\n".join([str(error).partition("\n")[0], *map(said, logs)])) from None
    except Exception as error:
        raise RuntimeError("\n".join([f"{type(error).__name__}: {error}", *map(said, logs)])) from error


@contextlib.contextmanager
def served(
    model: Path, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[serving.Server]:
    """A server while the block runs, with `ENV` and these variables."""
    with explained_by(log), serving.Server(model, arguments, {**ENV, **(env or {})}, log_path=log) as server:
        yield server


def serve(model: Path, log: Path, arm: Arm, texts: list[str]) -> Outcome:
    """`heard` of a server that is started for it."""
    with served(model, arm.arguments, log) as server:
        return heard(lambda asked: server.post("/generate", asked), texts)


def serve_all(models: Mapping[str, Path], folder: Path, arms: Mapping[str, Arm], texts: list[str]) -> dict[str, Any]:
    """Outcome or error of every arm."""

    def run(name: str, gpu: int) -> Outcome:
        arm = arms[name]
        return serve(models[arm.kind], folder / f"{file_name(name)}.log", arm.on(gpu), texts)

    return at_once({name: functools.partial(run, name) for name in arms})


def chosen(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """Its values in the chosen tests of this file that use the fixture which asks: servers of others need not start."""
    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    uses = [item for item in items if request.fixturename in item.fixturenames and hasattr(item, "callspec")]
    same = getattr(request, "param", None)
    if same is not None:
        uses = [item for item in uses if item.callspec.params[request.fixturename] == same]
    given = [item.callspec.params for item in uses]
    return list(dict.fromkeys(params[parameter] for params in given if parameter in params))


def at_once(tasks: Mapping[Any, Callable[[int], Any]]) -> dict[Any, Any]:
    """What each task returns or raises; they get the numbers of the GPUs in turn, and run at the same time."""

    def run(task: Callable[[int], Any], number: int) -> Any:
        try:
            return task(number % max(torch.cuda.device_count(), 1))
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(tasks)) as pool:
        return dict(zip(tasks, pool.map(run, tasks.values(), range(len(tasks))), strict=True))


def result(results: Mapping[Any, Any], name: Any) -> Any:
    """A task's of `at_once`; its error is raised, to the first that asks, and to others its first line."""
    found = results[name]
    if not isinstance(found, Exception):
        return found
    if getattr(found, "raised", False):
        raise RuntimeError(f"{name}: as above, {str(found).partition(chr(10))[0]}") from None
    found.raised = True  # type: ignore[attr-defined]
    raise found
