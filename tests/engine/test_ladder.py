"""The correctness ladder: every deliberate fault in the indexer or in attention is seen by a named check.

One server serves the tiny DSA model in its default mode (bf16, fp8 index keys) while `faults/ladder_faults.py` breaks
one thing after the other inside it. Accuracy alone is not enough (it does not see a wrong softmax scale), short
problems are not enough (they do not need what lies outside a window), so every rung runs all checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nsa_backend_plugin.accuracy.ask import Answer, answer_all
from nsa_backend_plugin.accuracy.compare import accuracy, compare
from nsa_backend_plugin.accuracy.questions import Item, load_items
from nsa_backend_plugin.serving import Server
from tests import sglang_plugin
from tests.engine import tiny_tasks
from tests.engine.conftest import HERE, run_python

pytestmark = pytest.mark.engine

#: Fault -> the check that must see it. Others may see it too.
LADDER = {
    "random": "arithmetic",
    "bottom_k": "arithmetic",
    "shifted_by_one_page": "arithmetic",
    "last_window": "recall",
    "dropped": "arithmetic",
    "softmax_scale": "logprobs",
    "latent_key_without_rope": "arithmetic",
    "index_key_without_rope": "logprobs",
    "stale_latent_page": "logprobs",
    "stale_index_page": "logprobs",
}
PROBLEMS, RECALLS = 6, 2  # as many as the server answers at once
MIN_RIGHT = 0.75  # of each kind; right code gets all of these few questions right
MIN_AGREEMENT = 0.9
LOGPROB_BAR = 0.025  # root mean square difference from transformers in float32, in nats


@dataclass(frozen=True)
class Tasks:
    arithmetic: list[Item]
    recall: list[Item]

    @property
    def all(self) -> list[Item]:
        return [*self.arithmetic, *self.recall]


class Climb:
    """One server and what its right answers are; `caught(fault)` names the checks that see a fault."""

    def __init__(self, server: Server, tasks: Tasks, folder: Path):
        self.server, self.tasks, self.folder = server, tasks, folder
        self.measured: dict[str, dict[str, float]] = {}
        self.seen: dict[str, set[str]] = {}
        self.texts = [tiny_tasks.encode(item.prompt) for item in (*tasks.arithmetic[:2], tasks.recall[0])]
        (folder / "texts.json").write_text(json.dumps(self.texts))
        run_python(HERE / "score_reference.py", tiny_tasks.MODEL, folder / "texts.json", folder / "scores.json")
        self.reference = json.loads((folder / "scores.json").read_text())
        self.set_fault("none")
        self.sound = self._answers("sound")

    def set_fault(self, fault: str) -> None:
        (self.folder / "fault").write_text(fault)

    def caught(self, fault: str) -> set[str]:
        self.set_fault(fault)
        answers = self._answers(fault)
        split = len(self.tasks.arithmetic)
        values = {
            "arithmetic": accuracy([a.correct for a in answers[:split]]).value,
            "recall": accuracy([a.correct for a in answers[split:]]).value,
            "agreement": compare(self.sound, answers).agreement,
            "logprobs": self._logprob_difference(),
        }
        self.measured[fault] = values
        bars = {"arithmetic": MIN_RIGHT, "recall": MIN_RIGHT, "agreement": MIN_AGREEMENT}
        seen = {name for name, bar in bars.items() if values[name] < bar}
        if not values["logprobs"] < LOGPROB_BAR:  # NaN counts as seen
            seen.add("logprobs")
        self.seen[fault] = seen
        return seen

    def _answers(self, run: str) -> list[Answer]:
        path, url = self.folder / f"{run}.jsonl", self.server.url
        answers, _ = answer_all(url, self.tasks.all, path, label=run, concurrency=8, max_tokens=64, timeout=300)
        return answers

    def _logprob_difference(self) -> float:
        """Over every token of some prompts: unlike the model's answers, its questions are hard to predict.

        Root mean square, because most tokens are sure either way and a wrong softmax scale moves few of them far.
        """
        body = {
            "input_ids": self.texts,
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        squares = []
        for text, expected, reply in zip(self.texts, self.reference, self.server.post("/generate", body), strict=True):
            rows = reply["meta_info"]["input_token_logprobs"][1:]
            assert [row[1] for row in rows] == text[1:]
            squares += [(row[0] - want) ** 2 for row, want in zip(rows, expected, strict=True)]
        return (sum(squares) / len(squares)) ** 0.5


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    folder = tmp_path_factory.mktemp("ladder-tasks")
    tiny_tasks.write_arithmetic(folder / "arithmetic.jsonl", prefixes=PROBLEMS, per_prefix=1, shots=3, seed=7)
    tiny_tasks.write_recall(folder / "recall.jsonl", RECALLS, tokens=250, seed=8)
    arithmetic, recall = (load_items(folder / f"{name}.jsonl", 0, None) for name in ("arithmetic", "recall"))
    return Tasks(arithmetic, recall)


@pytest.fixture(scope="module")
def climb(tasks: Tasks, start_server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Climb]:
    folder = tmp_path_factory.mktemp("ladder")
    sglang_plugin.declare(folder, "ladder_faults", "ladder_faults:install")
    (folder / "fault").write_text("none")
    env = {"PYTHONPATH": f"{folder}:{HERE / 'faults'}", "LADDER_FAULT_FILE": str(folder / "fault")}
    # Without the prefix cache no rung meets what another one computed.
    with start_server(tiny_tasks.MODEL, ("--disable-radix-cache",), env) as server:
        yield Climb(server, tasks, folder)


def test_right_code_passes_every_check(climb):
    assert climb.caught("none") == set(), climb.measured


@pytest.mark.parametrize("fault", LADDER)
def test_fault_is_caught(climb, fault):
    seen = climb.caught(fault)
    assert LADDER[fault] in seen, climb.measured[fault]


def test_right_code_passes_after_the_faults(climb):
    """What the rungs before saw was the faults, not a server that had worn out."""
    assert climb.caught("none again") == set(), climb.measured


def test_accuracy_alone_would_miss_faults(climb, capsys):
    """Why the ladder has several checks; prints what every check measured."""
    for fault in {"last_window", "softmax_scale"} - climb.measured.keys():
        climb.caught(fault)
    with capsys.disabled():
        print(f"\n{'fault':26} {'caught by':40} measured")
        for fault, values in climb.measured.items():
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            print(f"{fault:26} {', '.join(sorted(climb.seen[fault])) or '-':40} {numbers}")
    assert climb.measured["last_window"]["arithmetic"] >= MIN_RIGHT
    assert climb.measured["softmax_scale"]["arithmetic"] >= MIN_RIGHT
