"""Create a virtual environment that serves on a CPU: pinned SGLang, its CPU requirements and this package.

    python requirements/install.py VENV SGLANG_VERSION [--dev] [--plain]

Needs nothing but Python's standard library. Shows one progress line; pip's own output goes to VENV/install.log and
is shown when a step fails. A stamp of the inputs makes reruns instant.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_ANNOUNCED = re.compile(r"^\s*(?:Collecting|Downloading|Building wheel for|Installing collected packages:) ?(\S+)")


class Progress:
    """One line: step, package, elapsed seconds. Rewritten in place on a terminal, one line per step if plain."""

    def __init__(self, name: str, total: int, plain: bool):
        self.name, self.total, self.step, self.what = name, total, 0, ""
        self.start = time.monotonic()
        self.live = sys.stdout.isatty() and not plain
        self.stopped = threading.Event()

    def begin(self, what: str) -> None:
        self.step, self.what = self.step + 1, what
        if not self.live:
            print(self._line(), flush=True)

    def run(self) -> None:
        while self.live and not self.stopped.wait(0.5):
            print(f"\r\033[K{self._line()}", end="", flush=True)

    def finish(self) -> None:
        self.stopped.set()
        if self.live:
            print("\r\033[K", end="")

    def seconds(self) -> int:
        return int(time.monotonic() - self.start)

    def _line(self) -> str:
        return f"{self.name} [{self.step}/{self.total}] {self.what[:80]}  {self.seconds()} s"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold off other installations: setuptools builds beside the sources."""
    with (ROOT / "pyproject.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamp_of(requirements: Path) -> str:
    """Hash of everything that decides what gets installed."""
    digest = hashlib.sha256(sys.version.encode())
    stub = HERE / "torchvision-stub"
    sources = (stub / "pyproject.toml", *sorted(stub.glob("torchvision/*.py")))  # not what a build leaves there
    for path in (requirements, ROOT / "pyproject.toml", Path(__file__), *sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(progress: Progress, log: Path, title: str, *command: str) -> None:
    """Run a command, showing the package that pip works on; raise SystemExit with its own words when it fails."""
    progress.begin(title)
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # containers often set it; the first import is there to write
    lines = [f"$ {' '.join(command)}\n"]
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line)
                file.write(line)
                announced = _ANNOUNCED.match(line)
                if announced:
                    progress.what = f"{title}: {announced.group(1).split('/')[-1].rstrip(',')}"
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        progress.finish()
        errors = [line for line in lines[:-15] if line.startswith("ERROR")]
        print("".join([*errors, *lines[-15:]]), file=sys.stderr)
        raise SystemExit(f"{title}: failed with exit code {code}; complete output in {log}")


def install(venv: Path, version: str, dev: bool, plain: bool) -> None:
    requirements = HERE / f"sglang-{version}-cpu.txt"
    if not requirements.exists():
        known = ", ".join(sorted(p.name[7:-8] for p in HERE.glob("sglang-*-cpu.txt")))
        raise SystemExit(f"SGLANG_VERSION={version!r}: expected one of {known}")
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise SystemExit(f"Python {sys.version.split()[0]}: expected 3.10 to 3.13 (make PYTHON=python3.11 ...)")
    want = stamp_of(requirements)
    stamps = {name: venv / f".stamp-{name}" for name in ("serve", "dev")}
    acceptable = [stamps["dev"]] if dev else list(stamps.values())
    if any(path.exists() and path.read_text() == want for path in acceptable):
        return
    progress = Progress(venv.name, 6, plain)
    python, log = venv / "bin" / "python", venv / "install.log"
    # pip would compile every module of torch, transformers and SGLang, for over a minute; the first import, at the end,
    # compiles the quarter that a server needs.
    pip = (str(python), "-m", "pip", "install", "--no-compile", "--progress-bar", "off")
    ticker = threading.Thread(target=progress.run, daemon=True)
    ticker.start()
    try:
        progress.begin("creating the environment")
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        run(progress, log, f"requirements of SGLang {version}", *pip, "-r", str(requirements))
        run(progress, log, f"SGLang {version}", *pip, "--no-deps", f"sglang=={version}")
        with alone():
            run(progress, log, "torchvision stub", *pip, "--no-deps", str(HERE / "torchvision-stub"))
            run(progress, log, "nsa-backend-plugin", *pip, "-e", ".[dev]" if dev else ".")
        server = "import sglang.launch_server, sglang.srt.managers.scheduler"
        run(progress, log, "first import", str(python), "-c", server)
    finally:
        progress.finish()
    stamps["dev" if dev else "serve"].write_text(want)
    print(f"{venv.name}: SGLang {version} and nsa-backend-plugin installed in {progress.seconds()} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path)
    parser.add_argument("version", metavar="SGLANG_VERSION")
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    parser.add_argument("--plain", action="store_true", help="a line per step, as installations side by side need")
    options = parser.parse_args()
    try:
        install(options.venv.resolve(), options.version, options.dev, options.plain)
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} failed with exit code {error.returncode}")
