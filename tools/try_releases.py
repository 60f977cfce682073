"""Run the tests of the wiring to SGLang on releases that have no environment of their own, and record what happened.

    python -m tools.try_releases [0.5.22 ...] [-- more arguments of pytest]     # default: every supported release

Each release gets an environment below `.build/releases`, which later runs find again. The record is
docs/releases.json, from which README's table is checked; a release that is run again replaces its entry.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

from nsa_backend_plugin.engine import release as sglang_release
from tools import record, wheels

RECORD = record.ROOT / "docs" / "releases.json"
#: The list that the others are made from: what serving text on a CPU needs.
_BASE = record.ROOT / "requirements" / "sglang-0.5.17-cpu.txt"
#: Ours whatever a release asks for: torch has a build for CPUs, and numpy must suit Triton's interpreter.
_OURS = ("torch", "numpy")
#: What can break with a release: the hooks' targets, launch and refusals, index pages, every architecture, the metadata
#: of a split prefill, the answers of a server of each kind of model, and the demo. What these files have beside that is
#: our own, or the patches'.
_TESTS = tuple(
    f"tests/engine/test_{name}.py"
    for name in ("hooks", "refusals", "index_pages", "architectures", "context_parallel", "parity", "demo")
)
_LEFT_OUT = "not (patch or whole or page64-chunked or preshuffled or give_the_same or leaves_no or dies_is or pipeline)"
_PYTEST = ("-m", "pytest", "-q", "-m", "not gpu", "-k", _LEFT_OUT, *_TESTS)
_VERSIONS = """
import json, platform
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in ("torch", "triton")}}))
"""


def requirements(release: str) -> str:
    """The base list with the versions that the release's wheel asks for."""
    asked = {_name(line): line.split(";")[0] for line in wheels.requirements(release)}
    lines = [line.partition("#")[0].strip() for line in _BASE.read_text().splitlines()]
    names = [line for line in lines if line]
    return "\n".join(line if _name(line) in _OURS else asked.get(_name(line), line) for line in names) + "\n"


def environment(release: str) -> Path:
    """Python of the release's environment, which is made if it is not there yet."""
    folder = record.ROOT / ".build" / "releases"
    folder.mkdir(parents=True, exist_ok=True)
    needs = folder / f"{release}.txt"
    needs.write_text(requirements(release))
    installer = [sys.executable, "requirements/install.py", str(folder / release), release, "--dev", "--lines"]
    subprocess.run([*installer, "--requirements", str(needs)], cwd=record.ROOT, check=True)
    return folder / release / "bin" / "python"


def run(release: str, arguments: list[str]) -> dict[str, Any]:
    """The record's entry of a release, from a run of its tests."""
    python = environment(release)
    report = record.ROOT / ".build" / "releases" / f"{release}.xml"
    report.unlink(missing_ok=True)
    # One thread: see the Makefile's test.
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = (*_PYTEST, *arguments)
    subprocess.run([python, *command, f"--junitxml={report}"], cwd=record.ROOT, env=variables, check=False)
    [suite] = xml.etree.ElementTree.parse(report).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "release": release,
        **json.loads(record.output(str(python), "-c", _VERSIONS)),
        "command": " ".join(("python", *(f'"{word}"' if " " in word else word for word in command))),
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(float(suite.attrib["time"])),
    }


def main(words: list[str]) -> int:
    releases, arguments = record.versions_and_rest(words)
    failed = 0
    for release in releases or sglang_release.RELEASES:
        entry = run(release, arguments)
        record.write(RECORD, ("release",), entry)
        failed += entry["failed"]
    return 1 if failed else 0


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
