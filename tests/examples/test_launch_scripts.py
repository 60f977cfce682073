"""Launch scripts, and launch lines of the documents: both ends of SGLang's range parse them, our checks take them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_backend_plugin import settings

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "launch").glob("*.sh"))
NEWEST = ROOT / ".venv-0.5.23" / "bin" / "python"
#: Stands in for python3 on the scripts' PATH.
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$CAPTURED/argv"
env -0 > "$CAPTURED/env"
"""
PARSE = """
import argparse, json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
*commands, wrong = json.loads(sys.stdin.read())
try:
    parser.parse_args(wrong)
except SystemExit as error:  # or the rest could not fail
    print(error.code)
from nsa_backend_plugin.engine import launch
defaults = launch._defaults(ServerArgs)
launch._defaults = lambda args_class: defaults  # an object of the class would be resolved for this machine
for argv, on_rocm in commands:
    given = parser.parse_args(argv)
    given.device = given.device or "cuda"
    launch.rocm.on_rocm = lambda: on_rocm
    launch.check_arguments(given, as_given=True)
    print(json.dumps(given.attention_backend))
"""
DOCUMENTS = ("README.md", "docs/deployments.md")


def _captured(path: Path) -> list[str]:
    return path.read_text().rstrip("\0").split("\0")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Script name -> what it would have run: (arguments behind `-m sglang.launch_server`, variables it set)."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "python3").write_text(STUB)
    (folder / "python3").chmod(0o755)
    before = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CAPTURED": str(folder)}
    result = {}
    for script in SCRIPTS:
        subprocess.run([script, "some/model"], env=before, check=True, timeout=300)
        argv = _captured(folder / "argv")
        assert argv[:2] == ["-m", "sglang.launch_server"], script.name
        after = dict(pair.split("=", 1) for pair in _captured(folder / "env"))
        result[script.name] = argv[2:], {k: v for k, v in after.items() if before.get(k) != v}
    return result


def documented() -> list[list[str]]:
    """Arguments of the launch lines in the documents that are written out, and name our backend."""
    text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS).replace("\\\n", " ")
    lines = re.findall(r"^(?: {4})?python -m sglang\.launch_server (.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines if "..." not in line]


def test_documents_show_what_people_launch():
    lines = [" ".join(argv) for argv in documented()]
    for words in ("NEXTN", "--enable-dp-attention", "--disaggregation-mode prefill", "--disaggregation-mode decode"):
        assert any(words in line for line in lines)


@pytest.mark.parametrize("python", [Path(sys.executable), NEWEST], ids=["this SGLang", "0.5.23"])
def test_flags_exist(launched, python):
    if not python.exists():
        pytest.skip(f"{python} is missing: run `make setup-test`")
    commands = [(argv, "mi3" in name) for name, (argv, _) in launched.items()]
    commands += [(argv, False) for argv in documented()]
    wrong = [*commands[0][0], "--no-such-flag", "1"]
    env = {**os.environ, "TRITON_INTERPRET": "0", "NSA_PLUGIN_CPU": "0"}
    done = subprocess.run(
        [python, "-c", PARSE],
        input=json.dumps([*commands, wrong]),
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--no-such-flag" in done.stderr
    assert done.stdout.splitlines()[-len(commands) - 1 :] == ["2", *['"nsa_plugin"'] * len(commands)]


def run(script: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": path, "CAPTURED": path.partition(":")[0]}
    return subprocess.run([script, *arguments], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    (tmp_path / "python3").write_text(STUB)
    (tmp_path / "python3").chmod(0o755)
    return tmp_path


MTP = ("--speculative-algorithm", "NEXTN", "--json-model-override-args", '{"a": 1, "b": 2}')


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.parametrize("model", [("some/model",), ()], ids=["model", "default"])
def test_more_arguments_reach_the_server(script, model, stub):
    path = f"{stub}:{os.environ['PATH']}"
    done = run(script, path, *model, *MTP)
    if not model and "usage:" in done.stderr:  # a script without a model of its own
        assert done.returncode == 2
        assert done.stderr.strip() == f"usage: {script.name} MODEL [more server arguments]"
        assert not (stub / "argv").exists()
        return
    assert done.returncode == 0, done.stderr
    argv = _captured(stub / "argv")
    assert argv[-4:] == list(MTP)
    served = argv[argv.index("--model-path") + 1]
    assert served == "some/model" if model else "/" in served


def test_laptop_finds_the_environment_of_make_setup_or_names_it(tmp_path):
    """In a copy of the clone, with a python3 that has no SGLang."""
    script = tmp_path / "clone" / "examples" / "launch" / "laptop.sh"
    script.parent.mkdir(parents=True)
    script.write_text((ROOT / "examples" / "launch" / "laptop.sh").read_text())
    script.chmod(0o755)
    (tmp_path / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(script, path)
    python = tmp_path / "clone" / ".venv" / "bin" / "python"
    assert done.returncode == 1
    assert f"python3 has no sglang and {python} does not exist: run make setup" in done.stderr
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    assert run(script, path).returncode == 0
    argv = _captured(tmp_path / "argv")
    assert argv[:4] == ["-m", "sglang.launch_server", "--model-path", str(tmp_path / "clone/examples/models/tiny-dsa")]


def test_there_is_a_script_for_every_promised_host():
    names = " ".join(script.stem for script in SCRIPTS)
    for host in ("glm5_h200", "deepseek_v32_h200", "glm5_mi355x", "deepseek_v32_mi355x", "mi300x", "h100", "laptop"):
        assert host in names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_says_what_was_run_and_what_to_expect(script, launched):
    text = script.read_text()
    on_amd = "mi3" in script.stem
    stated = (
        "compile-checked, not run" if on_amd else "Run in continuous" if script.stem == "laptop" else "Not run here"
    )
    assert stated in text
    assert "# Expect: " in text
    argv, variables = launched[script.name]
    assert "some/model" in argv
    assert {name for name in variables if name.startswith("NSA_PLUGIN_")} <= set(settings.SETTINGS)
    if on_amd:
        assert variables["SGLANG_ROCM_FUSED_DECODE_MLA"] == "0"
        assert variables["ROCM_QUICK_REDUCE_QUANTIZATION"] == "INT4"
