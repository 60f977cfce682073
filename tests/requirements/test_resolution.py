"""Every set of requirements resolves, from wheels alone: no Python, release or build of torch needs a compiler.

Nothing is installed; needs the registry. The registry's plain build of torch is found as set-up finds it; the build for
CPUs is a wheel of metadata alone, since few registries have one for every Python.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from .installer import REQUIREMENTS, install

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RELEASES = tuple(sorted(path.name[7:-8] for path in REQUIREMENTS.glob("sglang-*-cpu.txt")))
#: What torch 2.13.0 needs beside CUDA's libraries and Triton.
CPU_METADATA = """Metadata-Version: 2.1
Name: torch
Version: 2.13.0+cpu
Requires-Dist: filelock
Requires-Dist: typing-extensions>=4.10.0
Requires-Dist: setuptools
Requires-Dist: sympy>=1.13.3
Requires-Dist: networkx>=2.5.1
Requires-Dist: jinja2
Requires-Dist: fsspec>=0.8.5
"""


@pytest.fixture(scope="module")
def uv() -> str:
    program = shutil.which("uv", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, f"uv is missing beside {sys.executable} and on PATH: set-up fetches {install.UV} there"
    return program


@pytest.fixture(scope="module")
def pip_config() -> str:
    return subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def cpu_builds(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("cpu_builds")
    for python in PYTHONS:
        tag = f"cp{python.replace('.', '')}"
        info = "torch-2.13.0+cpu.dist-info"
        with zipfile.ZipFile(folder / f"torch-2.13.0+cpu-{tag}-{tag}-manylinux_2_28_x86_64.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", CPU_METADATA)
            wheel.writestr(
                f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}-{tag}-manylinux_2_28_x86_64\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.mark.parametrize("build", ["plain", "cpu"])
@pytest.mark.parametrize("dev", [False, True], ids=["serve", "dev"])
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("python", PYTHONS)
def test_requirements_resolve_from_wheels(python, release, dev, build, uv, pip_config, cpu_builds):
    lines = pip_config.splitlines()
    if build == "plain":  # builds for CPUs come from a folder or an index beside the main one
        lines = [line for line in lines if not re.match(r"\S+\.(find-links|extra-index-url)=", line)]
    environment = install.uv_environment("\n".join(lines), os.environ)
    command = [
        uv,
        "pip",
        "compile",
        *install.compile_arguments(install.requirements_of(release), dev),
        "--only-binary",
        ":all:",
    ]
    command += ["--python", sys.executable, "--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--find-links", str(cpu_builds)] if build == "cpu" else []
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REQUIREMENTS.parent)
    assert finished.returncode == 0, finished.stderr
    versions = dict(re.findall(r"^([\w-]+)==(\S+)", finished.stdout, re.MULTILINE))
    assert versions["torch"] == ("2.13.0" if build == "plain" else "2.13.0+cpu")
    assert versions["triton"] == ("3.6.0" if dev else "3.7.1")
    assert any(name.startswith("nvidia-cudnn") for name in versions) == (build == "plain")
    assert not dev or "pytest" in versions
