"""What set-up says before it installs, and what it hands to uv."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from .installer import REQUIREMENTS, install

GOOD = install.Host(
    python=(3, 12),
    system="Linux",
    machine="x86_64",
    glibc=(2, 36),
    cpu_flags=frozenset({"avx", "avx2"}),
    ensurepip=True,
)


@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 12), (3, 13)])
def test_the_pythons_of_the_readme_are_taken(python):
    assert install.refusal(dataclasses.replace(GOOD, python=python)) is None


def test_this_machine_is_taken():
    assert install.refusal(install.Host.here()) is None


@pytest.mark.parametrize("glibc", [(2, 28), (2, 41)])
def test_a_glibc_that_the_wheels_are_made_for_is_taken(glibc):
    assert install.refusal(dataclasses.replace(GOOD, glibc=glibc)) is None


def test_unreadable_cpu_flags_refuse_nothing():
    assert install.refusal(dataclasses.replace(GOOD, cpu_flags=None)) is None


@pytest.mark.parametrize(
    "change, words",
    [
        ({"python": (3, 9)}, "Python 3.9: expected 3.10 to 3.13; `make PYTHON="),
        ({"python": (3, 14)}, "Python 3.14: expected 3.10 to 3.13"),
        ({"system": "Darwin", "glibc": ()}, "Darwin: expected Linux"),
        ({"machine": "aarch64"}, "aarch64 processor: expected x86-64"),
        ({"glibc": ()}, "a C library that is not glibc: expected glibc 2.28"),
        ({"glibc": (2, 17)}, "glibc 2.17: expected glibc 2.28"),
        ({"cpu_flags": frozenset({"avx"})}, "no AVX2"),
        ({"ensurepip": False}, "apt-get install python3.12-venv"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_what_a_machine_lacks_is_one_line_that_says_what_to_do(change, words):
    line = install.refusal(dataclasses.replace(GOOD, **change))
    assert words in line
    assert "\n" not in line


def test_too_little_disk_is_one_line_with_the_folder_and_both_sizes():
    venv, cache = pathlib.Path("/a/venv"), pathlib.Path("/b/cache")
    assert install.disk_refusal(6, {venv: 6.0, cache: 7.5}) is None
    line = install.disk_refusal(6, {venv: 9.0, cache: 5.94})
    assert line == "too little disk: /b/cache has 5.9 GB free, expected 6 GB"


def test_pips_indexes_and_connections_reach_uv():
    config = "\n".join(
        [
            ":env:.index-url='https://mirror/simple'",
            ":env:.disable-pip-version-check='1'",
            "global.index-url='https://file-of-pip/simple'",
            "global.extra-index-url='\\nhttps://one/simple\\nhttps://two/simple'",
            "global.find-links='/wheels /more-wheels'",
            "global.constraint='/etc/constraints.txt'",
            "global.cert='/etc/ca.crt'",
            "global.timeout='60'",
            "install.timeout='180'",
            "install.trusted-host='one two'",
            "install.proxy='http://proxy:3128'",
            "list.format='columns'",
        ]
    )
    mine = {"UV_CONSTRAINT": "/my/constraints.txt", "PATH": "/bin"}
    assert install.uv_environment(config, mine) == {
        "PATH": "/bin",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "https://one/simple https://two/simple",
        "UV_FIND_LINKS": "/wheels,/more-wheels",
        "UV_CONSTRAINT": "/my/constraints.txt",
        "UV_INSECURE_HOST": "one two",
        "SSL_CERT_FILE": "/etc/ca.crt",
        "ALL_PROXY": "http://proxy:3128",
        "UV_HTTP_TIMEOUT": "180",
    }


def test_downloads_are_shown_while_they_run():
    read = install.Announcements().read
    assert read("Resolved 125 packages in 641ms") is None
    assert read("Downloading nvidia-cudnn-cu13 (350.0MiB)") == "0.0 of 0.4 GB, 1 downloads under way: nvidia-cudnn-cu13"
    read("Downloading pygments (1.2MiB)")
    words = read("Downloading torch (1.5GiB)")
    assert words == "0.0 of 2.0 GB, 3 downloads under way: torch, nvidia-cudnn-cu13, pygments"
    assert read(" Downloaded nvidia-cudnn-cu13") == "0.4 of 2.0 GB, 2 downloads under way: torch, pygments"
    assert read("   Building nsa-backend-plugin @ file:///clone") == "building nsa-backend-plugin"
    assert read("Prepared 125 packages in 38.11s") == "linking files"
    assert read("Collecting torch==2.13.0") == "torch==2.13.0"
    assert read("  Downloading https://registry/torch-2.13.0-cp312.whl (506.1 MB)") == "torch-2.13.0-cp312.whl"
    assert read("Installing collected packages: mpmath, torch") == "mpmath"


def test_unknown_release_names_the_known_ones(tmp_path):
    command = [sys.executable, str(REQUIREMENTS / "install.py"), str(tmp_path / "venv"), "0.5.16"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stderr.strip() == "SGLANG_VERSION='0.5.16': expected one of 0.5.17, 0.5.23"
    assert not (tmp_path / "venv").exists()


def test_without_uv_the_reason_is_said_and_pip_goes_on(tmp_path, monkeypatch, capsys):
    installer = install.Installer(
        tmp_path, "0.5.17", install.requirements_of("0.5.17"), True, install.Progress("venv", 6, lines=True)
    )

    def fails(*command):
        raise subprocess.CalledProcessError(1, command, "ERROR: first\nERROR: No matching distribution found for uv\n")

    monkeypatch.setattr(installer, "output", fails)
    assert installer.find_uv() is None
    assert (
        "cannot be had (ERROR: No matching distribution found for uv); pip installs the same" in capsys.readouterr().out
    )
    steps = []
    monkeypatch.setattr(installer, "run", lambda title, *command: steps.append(command))
    installer.with_pip()
    assert [command[1:4] for command in steps] == [("-m", "pip", "install")] * 4
    assert steps[0][-2:] == ("-r", str(REQUIREMENTS / "sglang-0.5.17-cpu.txt"))
    assert steps[-1][-3:] == ("--no-deps", "-r", str(REQUIREMENTS / "dev-overrides.txt"))


def test_every_instruction_to_install_names_the_python():
    """A bare `pip` may belong to another Python than the one that runs SGLang; the plugin would land there."""
    root = REQUIREMENTS.parent
    folders = ("docs", "src", "benchmarks", "examples", "patches", "requirements")
    files = [*root.glob("*.md"), *(path for folder in folders for path in (root / folder).rglob("*"))]
    bare = re.compile(r"(?<!-m )\bpip[\d.]* install\b")
    texts = {path: path.read_text() for path in files if path.suffix in (".md", ".py", ".sh", ".txt", ".html", ".toml")}
    assert len(texts) > 100
    assert [str(path) for path, text in texts.items() if bare.search(text)] == []
