"""Models, servers and transformers references shared by the engine tests; everything lives in a temporary folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import pytest

from examples import make_random_model
from nsa_backend_plugin import serving
from tests import sglang_plugin
from tests.processes import HANGS_AFTER

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: One thread, because threads that spin at barriers crawl on a busy machine. The tests' own TRITON_INTERPRET must not
#: reach SGLang, which imports Triton everywhere.
SERVER_ENV = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}


def run_python(program: Path | str, *arguments: object, env: dict[str, str] | None = None) -> str:
    """Stdout of a script, or of a module by name, in the tests' interpreter; a failure shows the end of its stderr."""
    command = ["-m", program] if isinstance(program, str) else [str(program)]
    done = subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **SERVER_ENV, **(env or {})},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random-weight "mla" and "dsa" models."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("mla", "dsa"):
        with mock.patch.object(sys, "argv", ["make_random_model.py", kind, str(folder / kind)]):
            make_random_model.main()
    return {kind: folder / kind for kind in ("mla", "dsa")}


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, str]], dict[str, str]]:
    """Variables of a server, and those that make its processes forks.

    The servers of test_platform.py and test_demo.py go without, and start as a user's do.
    """
    folder = tmp_path_factory.mktemp("forks")
    sglang_plugin.declare(folder, "forks", "tests.sglang_plugin:fork")

    def variables(env: Mapping[str, str]) -> dict[str, str]:
        path = env.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        return {**env, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(folder), str(ROOT)]))}

    return variables


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory, forked) -> Callable[..., serving.Server]:
    """A server that is not started yet: `with start_server(model, args, env) as server`."""
    logs = tmp_path_factory.mktemp("logs")

    def make(
        model: Path, args: Sequence[str] = (), env: dict[str, str] | None = None, port: int | None = None
    ) -> serving.Server:
        log = logs / f"{len(list(logs.iterdir()))}.log"
        log.touch()
        variables = forked({**SERVER_ENV, **(env or {})})
        return serving.Server(model, [*serving.CPU_ARGS, *args], variables, port, log_path=log, timeout=HANGS_AFTER)

    return make


class Reference:
    """Greedy continuations by transformers, computed once per prompt and session."""

    def __init__(self, folder: Path, models: dict[str, Path]):
        self._folder, self._models = folder, models
        self._known: dict[tuple[str, tuple[int, ...]], dict] = {}

    def learn(self, kind: str, prompts: Sequence[list[int]], guess: Callable[[list[int]], list[int]]) -> None:
        """Compute the references that are missing; the guess of one only makes it fast."""
        missing = [p for p in prompts if (kind, tuple(p)) not in self._known]
        jobs = [{"prompt": p, "guess": guess(p)} for p in missing]
        if not jobs:
            return
        inputs, output = self._folder / "jobs.json", self._folder / "out.json"
        inputs.write_text(json.dumps(jobs))
        run_python(HERE / "greedy_reference.py", self._models[kind], inputs, output)
        for job, result in zip(jobs, json.loads(output.read_text()), strict=True):
            self._known[kind, tuple(job["prompt"])] = result

    def __call__(self, kind: str, prompt: list[int]) -> dict:
        """{"tokens", "logprobs"} of a prompt that was learnt."""
        return self._known[kind, tuple(prompt)]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"), models)
