"""The load comparison's wiring, with a server and a client that answer at once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from benchmarks import cli
from benchmarks.engine import serving
from benchmarks.run import environment
from nsa_backend_plugin.serving import ServerError

from .conftest import code

METRICS = {"median_ttft_ms": 10.0, "p99_ttft_ms": 20.0, "median_tpot_ms": 3.0, "p99_tpot_ms": 4.0, "duration": 2.0}


def process(run: Callable) -> SimpleNamespace:
    """What `serving` uses of subprocess, which others go on using."""
    return SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)


class FakeServer:
    """Records how it was started; `dies` does not become healthy."""

    started: ClassVar[list[tuple[list[str], dict[str, str]]]] = []
    dies: str = "none"

    def __init__(self, model: Path, args: list[str], env: dict[str, str], log_path: Path, timeout: float):
        self.args, self.env, self.url = args, env, "http://127.0.0.1:1"

    def __enter__(self) -> FakeServer:
        FakeServer.started.append((self.args, self.env))
        if any(self.dies in word for word in self.args):
            raise ServerError("the server exited with code 1")
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The client's commands; it answers twice as many tokens for the first server as for the others."""
    seen: list[list[str]] = []
    monkeypatch.setattr(FakeServer, "started", [])
    monkeypatch.setattr(FakeServer, "dies", "none")

    def client(command: list[str], **options: object) -> subprocess.CompletedProcess:
        if command[-1] == "--help":
            return subprocess.CompletedProcess(command, 0)
        seen.append(command)
        values = dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)
        rate = 100.0 * int(values["max-concurrency"]) / len(FakeServer.started)
        result = {**METRICS, "completed": int(values["num-prompts"]), "output_throughput": rate}
        Path(values["output-file"]).write_text(json.dumps(result) + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(serving, "Server", FakeServer)
    monkeypatch.setattr(serving, "subprocess", process(client))
    return seen


def words(tmp_path: Path, *more: str) -> list[str]:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    return ["serving", f"--model-path={model}", f"--out={tmp_path / 'out'}", *more]


def test_the_table_of_the_document(tmp_path: Path, clients: list[list[str]], capsys: pytest.CaptureFixture) -> None:
    """1k/1k and 8k/1k at concurrency 4 to 64, plugin beside stock, each point with its own fixed seed on both arms."""
    assert cli.main([*words(tmp_path), "--", "--tp", "8"]) == 0
    (plugin, on), (stock, off) = FakeServer.started
    assert plugin == ["--attention-backend=nsa_plugin", "--tp", "8"]
    assert stock == ["--tp", "8"]
    assert (on, off) == ({}, {"NSA_PLUGIN_DISABLE": "1"})
    [path] = (tmp_path / "out").glob("*.json")
    assert path.name == f"serving-model-{environment.machine('cpu')}.json"
    rows = json.loads(path.read_text())["rows"]
    points = [(p, 1024, n) for p in (1024, 8192) for n in (4, 8, 16, 32, 64)]
    assert [(r["arm"], r["prompt"], r["answer"], r["concurrency"]) for r in rows] == [
        (arm, *point) for arm in ("plugin", "stock") for point in points
    ]
    assert rows[0] | {"ttft_ms": 10.0, "ttft_p99_ms": 20.0, "tpot_ms": 3.0, "tpot_p99_ms": 4.0} == rows[0]
    assert [r["tokens_per_s"] for r in rows[:2]] == [400.0, 800.0]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    seeds = [next(w for w in command if w.startswith("--seed=")) for command in clients]
    assert seeds[:10] == seeds[10:] == [f"--seed={i}" for i in range(1, 11)]
    assert all({"--dataset-name=random-ids", "--random-range-ratio=1.0", "--flush-cache"} <= set(c) for c in clients)
    out = capsys.readouterr().out
    assert "[10/10] stock 8192/1024 at 64" in out
    assert "0.500" in out  # stock's tokens per second over the first arm's


def test_a_server_that_dies_costs_its_arm_only(tmp_path: Path, clients, monkeypatch, capsys) -> None:
    monkeypatch.setattr(FakeServer, "dies", "fa3")
    short = ["--shapes", "8:2", "--concurrency", "1"]
    assert cli.main(words(tmp_path, *short, "--arms", "stock --dsa-decode-backend=fa3", "plugin")) == 1
    assert "stock --dsa-decode-backend=fa3: the server exited" in capsys.readouterr().err
    [path] = (tmp_path / "out").glob("*.json")
    assert [r["arm"] for r in json.loads(path.read_text())["rows"]] == ["plugin"]


def test_a_client_that_cannot_run_is_noticed_before_a_server_starts(
    tmp_path: Path, clients, monkeypatch, capsys
) -> None:
    words_of_python = "Traceback (most recent call last):\nModuleNotFoundError: No module named 'datasets'\n"
    failed = subprocess.CompletedProcess(["client"], 1, stderr=words_of_python)
    monkeypatch.setattr(serving, "subprocess", process(lambda command, **options: failed))
    assert cli.main(words(tmp_path)) == 2
    assert "sglang.bench_serving does not run here: ModuleNotFoundError: No module named 'datasets'" in (
        capsys.readouterr().err
    )
    assert FakeServer.started == []


def test_requests_without_an_answer_are_no_result(tmp_path: Path, clients, monkeypatch, capsys) -> None:
    client = serving.subprocess.run

    def loses_one(command: list[str], **options: object) -> subprocess.CompletedProcess:
        done = client(command, **options)
        if command[-1] == "--help":
            return done
        path = Path(next(w for w in command if w.startswith("--output-file=")).partition("=")[2])
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "completed": content["completed"] - 1}))
        return done

    monkeypatch.setattr(serving, "subprocess", process(loses_one))
    assert cli.main(words(tmp_path, "--shapes", "8:2", "--concurrency", "2", "--arms", "plugin")) == 1
    assert "7 of 8 requests were answered" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--concurrency", "0"), "'0': expected a whole number of at least 1"),
        (("--shapes", "1k:1k"), "'1k': expected a whole number"),
        (("--arms", "plugin", "plugin"), "expected different arms"),
        (("--arms", "--tp"), "expected at least one argument"),
        (("--model-path", "nowhere"), "--model-path=nowhere: expected a folder"),
    ],
)
def test_bad_arguments(more: tuple[str, ...], error: str, tmp_path: Path, clients, capsys) -> None:
    assert code(*words(tmp_path, *more)) == 2
    assert error in capsys.readouterr().err
    assert FakeServer.started == []


def test_results_are_kept(tmp_path: Path, clients, capsys) -> None:
    short = words(tmp_path, "--shapes", "8:2", "--concurrency", "1", "--arms", "plugin")
    assert cli.main(short) == 0
    assert cli.main(short) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert cli.main([*short, "--force"]) == 0
