"""The nsa-plugin command: dispatch, doctor's findings, the demo's judgement, generated pages."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_backend_plugin import cli, serving, settings
from nsa_backend_plugin.commands import demo, doctor, hooks
from nsa_backend_plugin.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Of this process, too: it remembers which implementations were forced."""
    for name in list(os.environ):
        if name.startswith(("NSA_PLUGIN_", "SGLANG_")):
            monkeypatch.delenv(name)
    dispatch.forget_plans()
    yield
    dispatch.forget_plans()


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nsa_backend_plugin.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        timeout=300,
    )


def test_every_command_file_is_a_subcommand(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert {"demo", "doctor", "envs", "hooks"} <= set(cli.command_names())
    assert all(name in text for name in cli.command_names())


def test_only_the_named_command_is_imported(monkeypatch):
    loaded = []
    monkeypatch.setattr(cli, "_load", lambda name, load=cli._load: loaded.append(name) or load(name))
    cli.main(["envs"])
    assert loaded == ["envs"]


def test_unknown_command_lists_the_valid_ones(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctr"])
    assert caught.value.code == 2
    assert "doctor" in capsys.readouterr().err


def test_without_a_command_it_prints_help(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.command_names())


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "nsa_backend_plugin", "envs"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, settings.markdown())


def test_a_missing_module_is_named(monkeypatch, capsys):
    """`gsm8k --base-url` in an environment without SGLang and what it brings."""
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.delitem(sys.modules, "nsa_backend_plugin.accuracy.compare", raising=False)
    monkeypatch.delitem(sys.modules, "nsa_backend_plugin.accuracy.report", raising=False)
    monkeypatch.delattr("nsa_backend_plugin.accuracy.report", raising=False)  # which `from accuracy import` finds first
    assert cli.main(["gsm8k", "--base-url=http://host", "--data-path=data.jsonl"]) == 2
    assert "nsa-plugin gsm8k: import of scipy.stats halted" in capsys.readouterr().err


def test_exit_code_is_the_commands(monkeypatch):
    monkeypatch.setattr("nsa_backend_plugin.commands.envs.run", lambda options: 7)
    assert cli.main(["envs"]) == 7
    monkeypatch.setattr(
        "nsa_backend_plugin.commands.envs.run", lambda options: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert cli.main(["envs"]) == 130


def test_envs_prints_the_page(capsys):
    assert cli.main(["envs"]) == 0
    assert capsys.readouterr().out == settings.markdown()


def test_hook_page_is_what_the_command_prints():
    assert (ROOT / "docs/hooks.md").read_text() == hooks.markdown(), "run: nsa-plugin hooks > docs/hooks.md"


def test_doctor_reports_everything_and_finds_nothing_wrong():
    done = command("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert done.returncode == 0
    assert report["versions"]["sglang"]
    assert report["versions"]["torch"]
    assert report["device"]["arch"]
    assert report["device"]["fp8"].startswith("float8_e4m3")
    said = {row["operation"] for row in report["operations"]}
    assert {"topk.select", "sparse_mla.attend", "dense_mla.decode", "mqa_logits.paged", "mqa_logits.ragged"} < said
    for row in report["operations"]:
        assert row["chosen"]
        assert row["served"]
        assert all(row["declined"].values())
    assert [row["name"] for row in report["settings"]] == list(settings.SETTINGS)
    assert all(row["exists"] for row in report["hooks"] if row["needed"])
    assert len(report["hooks"]) > 5


@pytest.fixture
def nothing_is_imported(monkeypatch):
    """By a process beside the doctor's own, as a server would."""
    monkeypatch.setattr(doctor, "start_import", lambda: subprocess.Popen(["true"], stderr=subprocess.PIPE, text=True))


def test_doctor_says_what_is_wrong_and_what_to_do(nothing_is_imported, monkeypatch, capsys):
    wrong = {"TOPK_IMPL": "magic", "EXAKT": "1", "CPU": "2"}
    for name, value in wrong.items():
        monkeypatch.setenv(f"NSA_PLUGIN_{name}", value)
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    monkeypatch.setattr(doctor, "hooks", lambda *arguments: [])
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    for words in (
        "NSA_PLUGIN_TOPK_IMPL='magic': expected one of",
        "unknown setting NSA_PLUGIN_EXAKT='1'",
        "NSA_PLUGIN_CPU='2': expected one of auto, 0, 1",
        "SGLANG_PLUGINS=another does not list it",
        "add nsa_plugin to SGLANG_PLUGINS, or unset it",
    ):
        assert words in out
    assert "    -> " in out


@pytest.mark.parametrize("raw", ["1", "Yes"])
def test_doctor_disabled_is_a_problem(monkeypatch, raw):
    monkeypatch.setenv("NSA_PLUGIN_DISABLE", raw)
    problems = doctor.Problems()
    rows = doctor.settings_in_force(problems)
    assert {"name": "NSA_PLUGIN_DISABLE", "value": raw, "source": "environment"} in rows
    assert [p["todo"] for p in problems] == ["unset NSA_PLUGIN_DISABLE"]


def test_doctor_takes_an_empty_variable_for_an_unset_one(monkeypatch):
    monkeypatch.setenv("NSA_PLUGIN_DISABLE", "")
    problems = doctor.Problems()
    rows = doctor.settings_in_force(problems)
    assert {"name": "NSA_PLUGIN_DISABLE", "value": "0", "source": "default"} in rows
    assert problems == []


@pytest.mark.parametrize("module", ["transformers", "triton"])
def test_doctor_in_a_broken_environment(tmp_path, module):
    """What no server starts without is a problem, exit code 1, and never a traceback of the doctor's own."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = command("doctor", "--json", PYTHONPATH=path)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    found = [problem["problem"] for problem in report["problems"]]
    assert any(text.startswith("SGLang's server does not import (exit code 1): ") and module in text for text in found)
    assert all(problem["todo"] for problem in report["problems"])


def test_doctor_turns_what_a_check_raises_into_a_problem(nothing_is_imported, monkeypatch):
    """A broken torch, and an implementation file with an error in it."""

    def broken(*arguments):
        raise SyntaxError("invalid syntax (topk/mine.py, line 3)")

    for name in ("check_versions", "device", "hooks"):
        monkeypatch.setattr(doctor, name, broken)
    report = doctor.collect()
    assert [p["problem"] for p in report["problems"]] == [
        f"{what}: SyntaxError: invalid syntax (topk/mine.py, line 3)" for what in ("versions", "torch", "hooks")
    ]
    assert doctor.render(report)


def test_doctor_without_sglang_or_torch():
    problems = doctor.Problems()
    doctor.check_versions({"torch": None, "sglang": None}, problems)
    assert [p["problem"] for p in problems] == ["torch is not installed", "sglang is not installed"]


def test_doctor_refuses_an_unsupported_release(monkeypatch):
    monkeypatch.setattr("nsa_backend_plugin.engine.release.version", lambda: "0.5.15")
    problems = doctor.Problems()
    doctor.check_versions({"torch": "2", "sglang": "0.5.15"}, problems)
    assert "SGLang 0.5.15 is not supported" in problems[0]["problem"]


def test_doctor_reports_a_forced_implementation_that_cannot_run(monkeypatch):
    monkeypatch.setattr(dispatch, "_unavailable", functools.cache(lambda op, name, arch: "no such engine"))
    dispatch.forget_plans()
    problems = doctor.Problems()
    rows = doctor.operations("cpu", problems)
    monkeypatch.undo()
    dispatch.forget()
    assert len(problems) == len(rows) > 8
    assert "no such engine" in problems[0]["problem"]


ENVIRONMENTS = [
    {},
    {"SGLANG_PLUGINS": "nsa_plugin"},
    {"SGLANG_PLUGINS": " nsa_plugin , nsa_plugin_cpu"},
    {"SGLANG_PLUGINS": "another"},
    {"SGLANG_PLUGINS": ","},
    {"SGLANG_PLATFORM": "nsa_plugin_cpu"},
    {"SGLANG_PLATFORM": "nsa_plugin_cpu", "SGLANG_PLUGINS": "nsa_plugin"},
    {"SGLANG_PLATFORM": "another"},
]


def test_doctor_knows_sglangs_loading_rules():
    """The doctor's verdict on nsa_plugin against SGLang's own loader, for every combination above."""
    code = f"""
import json, os
from sglang.srt import plugins
verdicts = []
for environment in {ENVIRONMENTS!r}:
    os.environ.update(environment)
    loaded = plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP, plugins._get_excluded_dists())
    verdicts.append("nsa_plugin" in loaded)
    for name in environment:
        del os.environ[name]
print("VERDICTS", json.dumps(verdicts))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    actual = json.loads(done.stdout.rsplit("VERDICTS", 1)[1])
    reported = [doctor.entry_points(environment, True, doctor.Problems())[0]["loaded"] for environment in ENVIRONMENTS]
    assert reported == actual
    assert True in actual
    assert False in actual


@pytest.mark.parametrize("environment, on_cpu, names", [
    ({"SGLANG_PLUGINS": "nsa_plugin"}, True, ["nsa_plugin_cpu"]),
    ({"SGLANG_PLUGINS": "nsa_plugin"}, False, []),
    ({"SGLANG_PLUGINS": "nsa_plugin_cpu"}, False, ["nsa_plugin"]),
    ({"SGLANG_PLATFORM": "another"}, False, ["nsa_plugin"]),
    ({"SGLANG_PLATFORM": "nsa_plugin_cpu"}, True, []),
    ({"SGLANG_PLATFORM": "nsa_plugin_cpu"}, False, ["SGLANG_PLATFORM=nsa_plugin_cpu on a machine with a GPU"]),
])  # fmt: skip
def test_doctor_only_complains_about_the_entry_points_that_are_needed(environment, on_cpu, names):
    problems = doctor.Problems()
    doctor.entry_points(environment, on_cpu, problems)
    assert len(problems) == len(names)
    for name, problem in zip(names, problems, strict=True):
        assert name in problem["problem"]
        assert problem["todo"]


class FakeServer:
    """Answers every question with the given text."""

    def __init__(self, text: str):
        self.text = text
        self.bodies: list[dict] = []

    def post(self, path: str, body: dict) -> dict:
        assert path == "/generate"
        self.bodies.append(body)
        return {"text": self.text, "meta_info": {"prompt_tokens": 5, "completion_tokens": 3}}


QUESTIONS = ROOT / "examples/demo/problems.jsonl"


def test_demo_questions():
    questions = demo.load_questions(QUESTIONS)
    assert [q.kind for q in questions] == ["problem"] * 6 + ["recall"]
    for q in questions:
        assert q.answer.isdigit()
        assert q.prompt.endswith(f"Question: {q.question}\nAnswer:")
        assert "####" in q.prompt, "worked examples go first"
    recall = questions[-1]
    assert recall.prompt.index(f": {recall.answer}.") < 200, "the memo stands at the start"
    assert len(recall.prompt) > 1500, "and the question far from it"


def test_demo_problems_are_held_out():
    """No operand pair of a question is one that training used (`is_test_pair` in examples/tiny_dsa/data.py)."""
    for q in demo.load_questions(QUESTIONS)[:-1]:
        row = next(r for r in map(json.loads, QUESTIONS.read_text().splitlines()) if r["question"] == q.question)
        marks = [part.split("=")[0] for part in row["answer"].split("<<")[1:]]
        for mark in marks:
            a, b = map(int, mark.replace("-", "+").split("+"))
            assert (a * 37 + b * 101) % 8 == 3


@pytest.mark.parametrize(
    "text, answer",
    [(" 3+4=7.\n#### 7\n\n", "7"), ("#### 1\n#### 2", "1"), ("seven", None), ("####", None), ("#### -12", "-12")],
)
def test_demo_final_answer(text, answer):
    assert demo.final_answer(text) == answer


def test_demo_counts_right_answers(capsys):
    questions = demo.load_questions(QUESTIONS)
    first = questions[0].answer
    server = FakeServer(f" so it is\n#### {first}")
    right = demo.ask_all(server, questions)
    assert right == sum(q.answer == first for q in questions) < len(questions)
    text = capsys.readouterr().out
    assert f"WRONG, expected {questions[1].answer}" in text
    assert "tokens/s" in text
    assert server.bodies[0]["sampling_params"]["temperature"] == 0
    assert demo.ask_all(FakeServer("noise"), questions) == 0


def test_demo_shows_the_servers_own_kernel_lines(tmp_path, capsys):
    log = tmp_path / "server.log"
    log.write_text(
        "[t] nsa_plugin op topk.select: torch runs k=1 (x)\nnoise: no\n[t] nsa_plugin op concat.q_all: torch runs (x)\n"
    )
    demo.print_kernels(log)
    assert capsys.readouterr().out.split("\n")[2:4] == [
        "    topk.select: torch runs k=1 (x)",
        "    concat.q_all: torch runs (x)",
    ]


@pytest.fixture
def no_server(monkeypatch):
    """Fails where a server would be started."""
    monkeypatch.setattr(serving.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))


@pytest.mark.parametrize("port", ["99999", "-5", "0"])
def test_demo_refuses_what_is_not_a_port(no_server, capsys, port):
    assert cli.main(["demo", f"--port={port}"]) == 2
    assert f"nsa-plugin demo: port {port}: expected 1 to 65535" in capsys.readouterr().err


def test_demo_notices_a_taken_port_at_once(no_server, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert cli.main(["demo", f"--port={port}", f"--log={tmp_path / 'log'}"]) == 1
    assert f"nsa-plugin demo: port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected at least one question"),
        ('{"role": "shot", "question": "q", "answer": "#### 1"}', "expected at least one question"),
        ("{", "questions.jsonl:1: not JSON"),
        ('{"role": "problem", "question": "q"}', 'questions.jsonl:1: expected an object with "question" and "answer"'),
        ('{"question": "q", "answer": "seven"}', "expected a number behind #### in every answer, got 'seven'"),
    ],
)
def test_demo_refuses_a_file_without_questions(no_server, tmp_path, capsys, text, message):
    (tmp_path / "questions.jsonl").write_text(text)
    assert cli.main(["demo", f"--questions={tmp_path / 'questions.jsonl'}"]) == 2
    assert message in capsys.readouterr().err


def test_demo_names_a_log_that_cannot_be_written(no_server, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", f"--log={tmp_path / 'file' / 'log'}"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.fixture
def installed(tmp_path) -> dict[str, str]:
    """The environment of a copy outside of any clone, as `python -m pip install --no-deps .` makes one."""
    shutil.copytree(ROOT / "src" / "nsa_backend_plugin", tmp_path / "site" / "nsa_backend_plugin")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


def run_installed(installed: dict[str, str], where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nsa_backend_plugin", *arguments]
    return subprocess.run(command, cwd=where, env=installed, capture_output=True, text=True, timeout=300)


def test_doctor_with_a_broken_implementation_file(installed, tmp_path):
    """Somebody's own kernel that does not compile: its name and the error are in the report, and no traceback."""
    (tmp_path / "site/nsa_backend_plugin/ops/topk/mine.py").write_text("def available(arch:\n")
    code = """
import json
from nsa_backend_plugin.commands import doctor
problems = doctor.Problems()
rows = doctor.attempt("operations", problems, doctor.operations, "cpu", problems)
print(json.dumps([rows, problems]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "SyntaxError" in done.stdout
    assert "mine" in done.stdout


@pytest.mark.parametrize("folder", ["", "examples/launch"])
def test_an_installed_package_finds_the_clone_that_the_user_stands_in(installed, folder):
    patch = run_installed(installed, ROOT / folder, "patch", "--check", "no_such")
    assert patch.returncode == 2
    assert re.search(r"unknown patch no_such: expected .*\bdraft_backends\b", patch.stderr)
    demo = run_installed(installed, ROOT / folder, "demo", "--port=0")
    assert (demo.returncode, "port 0: expected" in demo.stderr) == (2, True), "model and questions are there"


@pytest.mark.parametrize("arguments", [("patch", "--check"), ("demo",), ("bench",)])
def test_an_installed_package_elsewhere_says_how_to_get_the_rest(installed, tmp_path, arguments):
    done = run_installed(installed, tmp_path, *arguments)
    assert done.returncode == 2
    assert "python -m pip install --no-deps -e ." in done.stderr
    assert f"{tmp_path} is not in a source checkout" in done.stderr


def test_demo_without_the_model(tmp_path, capsys):
    assert cli.main(["demo", "--model-path", str(tmp_path / "absent")]) == 2
    assert "pass --model-path" in capsys.readouterr().err
