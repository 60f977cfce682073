"""`nsa-plugin gsm8k` as a whole: reports, exit codes, messages, resuming. Servers are stand-ins that answer at once."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nsa_backend_plugin import __version__, cli
from nsa_backend_plugin.accuracy import runs
from nsa_backend_plugin.serving import ServerError
from tests.accuracy.conftest import FakeServer

KERNELS = "[t] nsa_plugin op topk.select: torch runs k=1 (x)\n[t] nsa_plugin op sparse_mla.attend: triton runs (x)\n"


class FakeLaunch:
    """Stands in for `serving.Server`: every start is a FakeServer set up by `prepare(command, server)`."""

    started: list[list[str]]

    def __init__(self, model_path, args, env, log_path, timeout):
        self.command = ["python", "-m", "sglang.launch_server", f"--model-path={model_path}", *args]
        self.log_path, self.env = log_path, env

    def __enter__(self):
        FakeLaunch.started.append(self.command)
        self.log_path.write_text(KERNELS)
        self.fake = FakeServer()
        FakeLaunch.prepare(self, self.fake)
        self.url = self.fake.url
        return self

    def __exit__(self, *exception):
        self.fake.close()

    def running(self):
        return self.fake.fail_after is None

    def log_tail(self, lines):
        return "CUDA out of memory"

    @staticmethod
    def prepare(launch, server): ...


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> type[FakeLaunch]:
    monkeypatch.setattr(runs, "Server", FakeLaunch)
    monkeypatch.setattr(FakeLaunch, "started", [], raising=False)
    monkeypatch.setattr(FakeLaunch, "prepare", staticmethod(lambda launch, server: None))
    return FakeLaunch


def command(data: Path, *more: str, model: str = "m") -> list[str]:
    base = ["gsm8k", "--model-path", model, "--data-path", str(data), "--num-shots", "2", "--concurrency", "3"]
    return [*base, "--out", str(data.parent / "out"), *more]


def report(data: Path) -> dict:
    return json.loads((data.parent / "out" / "report.json").read_text())


def test_running_server(server, data, tmp_path, capsys):
    base = ["gsm8k", "--base-url", f"{server.url}/v1/", "--data-path", str(data), "--num-shots", "2"]
    base += ["--out", str(tmp_path / "out")]
    assert cli.main(base) == 0
    printed = capsys.readouterr()
    assert "1.0000" in printed.out
    assert "10/10 right" in printed.err, "the progress bar"
    assert report(data)["arms"][0]["accuracy"]["right"] == 10
    data.write_text(data.read_text().replace("#### 5", "#### 6"))
    assert cli.main([*base, "--min-accuracy", "0.95"]) == 1
    assert "accuracy 0.9000 is below 0.95" in capsys.readouterr().out
    assert cli.main([*base, "--arms", "nsa_plugin,dsa"]) == 2
    assert "--base-url serves one arm" in capsys.readouterr().err


def test_report_says_what_ran(launches, data, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nsa-plugin", "gsm8k", "--data-path", "a b.jsonl"])
    assert cli.main(command(data, "--arms", "nsa_plugin", "nsa_plugin NAME=1", "--", "--tp=8")) == 0
    out = capsys.readouterr().out
    found = report(data)
    assert found["command"] == "nsa-plugin gsm8k --data-path 'a b.jsonl'"
    assert found["versions"]["nsa-backend-plugin"] == __version__
    assert {"commit", "sglang", "torch", "triton", "python"} <= found["versions"].keys()
    assert found["data"]["questions"] == 10
    assert len(found["data"]["sha256"]) == 64
    first, second = found["arms"]
    assert first["kernels"] == ["topk.select: torch runs k=1 (x)", "sparse_mla.attend: triton runs (x)"]
    assert first["command"][3:] == ["--model-path=m", "--attention-backend=nsa_plugin", "--tp=8"]
    assert first["device"].startswith("cpu")
    assert first["server"]["version"] == "0.5.17"
    assert second["env"] == {"NAME": "1"}
    (pair,) = found["pairs"]
    assert pair["completion"]["agreement"] == 1.0
    assert not pair["completion"]["differs"]
    for text in ("do not differ", "topk.select: torch; sparse_mla.attend: triton", f"nsa-backend-plugin {__version__}"):
        assert text in out
    assert f"torch {found['versions']['torch']}" in out
    assert "command: nsa-plugin gsm8k" in out


def test_any_two_arms_are_compared(launches, data, capsys):
    """The second and the third arm differ, the first differs from neither: still exit code 1."""
    rows = [{"question": f"item {i}", "answer": f"#### {i}"} for i in range(42)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prepare(launch, server):
        wrong = {"a": range(2, 7), "b": range(2, 2), "c": range(7, 14)}[launch.env["ARM"]]
        server.wrong = {str(number) for number in wrong}

    launches.prepare = staticmethod(prepare)
    arms = ["x ARM=a", "x ARM=b", "x ARM=c"]
    assert cli.main(command(data, "--arms", *arms)) == 1
    out = capsys.readouterr().out
    assert "x ARM=a and x ARM=b do not differ" in out
    assert "x ARM=a and x ARM=c do not differ" in out
    assert "x ARM=b and x ARM=c differ by more than chance" in out
    assert "FAILED: x ARM=b and x ARM=c differ by more than chance (completion)" in out
    assert len(report(data)["pairs"]) == 3


def test_dead_server_keeps_answers_and_rerun_resumes(launches, data, capsys):
    seen = []

    def prepare(launch, server):
        seen.append(server)
        if "--attention-backend=second" in launch.command and len(seen) == 2:
            server.fail_after = 4

    launches.prepare = staticmethod(prepare)
    arms = command(data, "--arms", "first,second")
    assert cli.main(arms) == 2
    error = capsys.readouterr().err
    for text in ("second: the server at", "answers are kept in", "has died; end of", "CUDA out of memory"):
        assert text in error
    kept = len((data.parent / "out" / "second" / "answers.jsonl").read_text().splitlines())
    assert 0 < kept < 10
    assert cli.main(arms) == 0
    backends = [line[4] for line in launches.started]
    assert backends == [f"--attention-backend={name}" for name in ("first", "second", "second")]
    assert len(seen[2].prompts) == 10 - kept
    assert "first: every answer is in" in capsys.readouterr().out
    assert report(data)["arms"][0]["tokens_per_second"] > 0


def test_answers_of_another_run_are_refused(launches, data, server, capsys):
    assert cli.main(command(data)) == 0
    for other, message in (
        (command(data, model="other"), "model_path 'm', now 'other'"),
        (command(data, "--max-tokens", "3"), "max_tokens 512, now 3"),
        (command(data, "--", "--tp=2"), r"server_args [], now ['--tp=2']"),
    ):
        assert cli.main(other) == 2
        error = capsys.readouterr().err
        assert "holds the answers of another run" in error
        assert message in error
    assert len(launches.started) == 1


def test_full_disk_keeps_answers(launches, data, capsys, monkeypatch):
    """The disk fills while what is known of the finished arm is written: the rerun asks nothing again."""
    write = Path.write_text

    def full(path, text):
        if path.name.startswith("facts"):
            write(path, text[:5])
            raise OSError(28, "No space left on device")
        return write(path, text)

    servers = []
    launches.prepare = staticmethod(lambda launch, server: servers.append(server))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert cli.main(command(data)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert cli.main(command(data)) == 0
    assert [len(server.prompts) for server in servers] == [10, 0]
    assert report(data)["arms"][0]["accuracy"]["right"] == 10


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can be longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "size, shots, name", [(20, "8", "settings.json"), (300, "8", "answers.jsonl"), (600, "11", "report.json")]
)
def test_full_disk_names_the_file(server, data, capsys, size, shots, name):
    base = ["gsm8k", "--base-url", server.url, "--data-path", str(data), "--num-shots", shots]
    with full_disk(size):
        assert cli.main([*base, "--out", str(data.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert "File too large" in error
    assert f"{name}'" in error
    assert not list(data.parent.rglob("*.partial"))


def test_the_same_model_by_another_path_resumes(launches, data, monkeypatch, capsys):
    model = data.parent / "models" / "m"
    model.mkdir(parents=True)
    assert cli.main(command(data, model=str(model))) == 0
    monkeypatch.chdir(model.parent)
    assert cli.main(command(data, model="m")) == 0
    assert cli.main(command(data, model="../models/m/")) == 0
    assert len(launches.started) == 1
    assert launches.started[0][3] == f"--model-path={model}"
    assert "every answer is in" in capsys.readouterr().out


def test_server_that_does_not_start(launches, data, capsys):
    def prepare(launch, server):
        server.close()
        raise ServerError("the server exited with code 1; end of server.log:\nno such model")

    launches.prepare = staticmethod(prepare)
    assert cli.main(command(data)) == 2
    assert "no such model" in capsys.readouterr().err
    launches.prepare = staticmethod(lambda launch, server: None)
    assert cli.main(command(data, "--", "--tp=2")) == 0, "other arguments are free to try while nothing was answered"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data-path", "missing.jsonl"], "missing.jsonl"),
        (["--num-shots", "99"], "--num-shots 99"),
        (["--num-examples", "0"], "--num-examples 0"),
        (["--concurrency", "0"], "--concurrency 0: expected more than 0"),
        (["--timeout", "-1"], "--timeout -1.0: expected more than 0"),
        (["--min-accuracy", "5"], "--min-accuracy 5.0: expected a share, 0 to 1"),
        (["--min-accuracy", "-0.1"], "--min-accuracy -0.1: expected a share, 0 to 1"),
        (["--min-accuracy", "nan"], "--min-accuracy nan: expected a share, 0 to 1"),
        (["--timeout", "nan"], "--timeout nan: expected more than 0"),
        (["--arms", "nsa_plugin what"], "'what' is neither NAME=VALUE nor --flag=value"),
        (["--sgl-eval-data", "missing.jsonl"], "sgl-eval is not on PATH"),
    ],
)
def test_bad_arguments_start_no_server(launches, data, capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", "")
    assert cli.main(command(data, *arguments)) == 2
    assert message in capsys.readouterr().err
    assert launches.started == []
