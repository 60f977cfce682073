"""Create a virtual environment that serves on a CPU: pinned SGLang, its CPU requirements and this package.

    python requirements/install.py VENV SGLANG_VERSION [--dev] [--pip] [--lines] [--requirements FILE]

Needs nothing but Python's standard library with venv. Packages come through uv, which pip fetches first and which is
given pip's own indexes; where it cannot be had, or with --pip, pip installs the same. The tools' output goes to
VENV/install.log and is shown when a step fails. A stamp of the inputs makes reruns instant.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DEV_OVERRIDES = HERE / "dev-overrides.txt"
TORCHVISION_STUB = HERE / "torchvision-stub"
UV = "uv==0.13.9"
#: Disk for the packages of one environment, measured: torch as most registries have it, and a build for CPUs only.
PLAIN_GB, CPU_GB, PLAIN_DOWNLOAD_GB = 6, 2, 3
#: Options of pip -> what uv reads instead. Lists are separated by blanks on both sides but for find-links.
UV_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
_PIP_ANNOUNCES = re.compile(r"^\s*(?:Collecting|Downloading|Building wheel for|Installing collected packages:) ?(\S+)")
_UV_ANNOUNCES = re.compile(r"^\s*(Downloading|Downloaded|Building|Built|Prepared) (\S+)(?: \(([\d.]+)([KMG])iB\))?")
_GB_PER_UNIT = {"K": 1.024e-6, "M": 1.049e-3, "G": 1.074}


@dataclass(frozen=True)
class Host:
    """What an installation needs to know of the machine. cpu_flags: None where they cannot be read."""

    python: tuple[int, int]
    system: str
    machine: str
    glibc: tuple[int, ...]
    cpu_flags: frozenset[str] | None
    ensurepip: bool

    @classmethod
    def here(cls) -> Host:
        libc, version = platform.libc_ver()
        try:
            flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        except OSError:
            flags = None
        return cls(
            python=sys.version_info[:2],
            system=platform.system(),
            machine=platform.machine(),
            glibc=tuple(int(part) for part in version.split(".")) if libc == "glibc" else (),
            cpu_flags=frozenset(flags.group(1).split()) if flags else None,
            ensurepip=importlib.util.find_spec("ensurepip") is not None,
        )


def refusal(host: Host) -> str | None:
    """Why nothing can be installed here, and what to do about it: one line. None where it can."""
    python = ".".join(map(str, host.python))
    if not (3, 10) <= host.python <= (3, 13):
        return f"Python {python}: expected 3.10 to 3.13; `make PYTHON=python3.12 ...` picks another"
    if host.system != "Linux":
        return f"{host.system}: expected Linux, which alone has all the wheels; a container or virtual machine will do"
    if host.machine != "x86_64":
        return f"{host.machine} processor: expected x86-64, without which nothing here was tried"
    if host.glibc < (2, 28):
        found = "glibc " + ".".join(map(str, host.glibc)) if host.glibc else "a C library that is not glibc"
        return f"{found}: expected glibc 2.28 or later, as in Debian 10 and Ubuntu 20.04, for the wheels of torch"
    if host.cpu_flags is not None and "avx2" not in host.cpu_flags:
        return "this processor has no AVX2, without which nothing here was tried: take one of 2015 or later"
    if not host.ensurepip:
        return (
            f"Python {python} cannot make virtual environments with pip: install its ensurepip "
            f"(Debian, Ubuntu: apt-get install python{python}-venv)"
        )
    return None


def disk_refusal(gigabytes: float, free: Mapping[Path, float]) -> str | None:
    """One line if a folder's file system has fewer free gigabytes than will be written there."""
    for folder, has in free.items():
        if has < gigabytes:
            return f"too little disk: {folder} has {has:.1f} GB free, expected {gigabytes:g} GB"
    return None


class Progress:
    """One line: step, package, elapsed seconds. Rewritten in place on a terminal; elsewhere, or with `lines`, a new
    line at each step and every ten seconds in which it changed."""

    def __init__(self, name: str, total: int, lines: bool):
        self.name, self.total, self.step, self.what, self.printed = name, total, 0, "", ""
        self.start = time.monotonic()
        self.live = sys.stdout.isatty() and not lines
        self.stopped = threading.Event()

    def begin(self, what: str) -> None:
        self.step, self.what = self.step + 1, what
        if not self.live:
            self._print()

    def say(self, line: str) -> None:
        """A line that stays."""
        print(f"\r\033[K{line}" if self.live else line, flush=True)

    def run(self) -> None:
        while not self.stopped.wait(0.5 if self.live else 10):
            if self.live:
                print(f"\r\033[K{self._line()}", end="", flush=True)
            elif self.what != self.printed:
                self._print()

    def finish(self) -> None:
        self.stopped.set()
        if self.live:
            print("\r\033[K", end="")

    def seconds(self) -> int:
        return int(time.monotonic() - self.start)

    def _print(self) -> None:
        self.printed = self.what
        print(self._line(), flush=True)

    def _line(self) -> str:
        return f"{self.name} [{self.step}/{self.total}] {self.what[:90]}  {self.seconds()} s"


class Announcements:
    """Reads a tool's output line by line and says what it is at."""

    def __init__(self) -> None:
        self.sizes: dict[str, float] = {}  # GB, of the downloads that were announced
        self.done: set[str] = set()

    def read(self, line: str) -> str | None:
        """A few words, or None where the line announces nothing."""
        if pip := _PIP_ANNOUNCES.match(line) if "iB)" not in line else None:
            return pip.group(1).split("/")[-1].rstrip(",")
        if not (uv := _UV_ANNOUNCES.match(line)):
            return None
        verb, name, size, unit = uv.groups()
        if verb == "Downloading" and size:
            self.sizes[name] = float(size) * _GB_PER_UNIT[unit]
        elif verb == "Downloaded":
            self.done.add(name)
        elif verb == "Prepared":
            return "linking files"
        else:
            return f"{verb.lower()} {name}"
        left = sorted(self.sizes.keys() - self.done, key=self.sizes.__getitem__, reverse=True)
        have = sum(self.sizes[name] for name in self.sizes.keys() & self.done)
        return (
            f"{have:.1f} of {sum(self.sizes.values()):.1f} GB, {len(left)} downloads under way: {', '.join(left[:3])}"
        )


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold off other installations: setuptools builds beside the sources."""
    with (ROOT / "pyproject.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamp_of(requirements: Path) -> str:
    """Hash of everything that decides what gets installed."""
    digest = hashlib.sha256(sys.version.encode())
    sources = sorted(TORCHVISION_STUB.glob("torchvision/*.py"))  # not what a build leaves there
    project = (ROOT / "pyproject.toml", TORCHVISION_STUB / "pyproject.toml")
    for path in (requirements, DEV_OVERRIDES, Path(__file__), *project, *sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def uv_environment(pip_config: str, environment: Mapping[str, str]) -> dict[str, str]:
    """uv's variables for the indexes and connections that pip has. What the environment already says to uv stays.

    pip_config: the output of `pip config list`, which has the files' and the environment's settings.
    """
    settings: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}  # the later ones win, as in pip
    for line in pip_config.splitlines():
        if match := re.fullmatch(r"(:env:|\w+)\.([\w-]+)=(.*)", line):
            section, option, value = match.groups()
            settings.get(section, {})[option] = str(ast.literal_eval(value))
    merged = {option: value for section in settings.values() for option, value in section.items()}
    wanted = {
        # As pip: the best version of all indexes, not the first index that has the package.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_PYTHON_DOWNLOADS": "never",
    }
    for option, variable in UV_VARIABLES.items():
        if parts := merged.get(option, "").split():
            wanted[variable] = ("," if option == "find-links" else " ").join(parts)
    return {**wanted, **environment}


def requirements_of(version: str) -> Path:
    return HERE / f"sglang-{version}-cpu.txt"


def compile_arguments(requirements: Path, dev: bool) -> tuple[str, ...]:
    """What `uv pip compile` resolves for a release, from the repository's root: the set of requirements and how it is
    written."""
    extra = ("pyproject.toml", "--extra", "dev", "--override", str(DEV_OVERRIDES)) if dev else ()
    return (str(requirements), *extra, "--upgrade", "--quiet", "--no-header", "--no-annotate")


class Installer:
    """The steps of one environment."""

    def __init__(self, venv: Path, version: str, requirements: Path, dev: bool, progress: Progress):
        self.venv, self.version, self.requirements, self.dev, self.progress = venv, version, requirements, dev, progress
        self.python, self.log, self.lock = venv / "bin" / "python", venv / "install.log", venv / "requirements.txt"
        self.environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        # Containers often set it; the first import, the last step, is there to write.
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def output(self, *command: str) -> str:
        """What a short command prints, both streams; raises CalledProcessError."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ).stdout

    def run(self, title: str, *command: str) -> None:
        """Run a step, showing the package that it works on; raise SystemExit with its own words when it fails."""
        self.progress.begin(title)
        lines, announcements = [f"$ {' '.join(command)}\n"], Announcements()
        with self.log.open("a") as file:
            file.write(lines[0])
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    lines.append(line)
                    file.write(line)
                    if words := announcements.read(line):
                        self.progress.what = f"{title}: {words}"
                code = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if code:
            self.progress.finish()
            errors = [line for line in lines[:-15] if line.startswith("ERROR")]
            print("".join([*errors, *lines[-15:]]), file=sys.stderr)
            raise SystemExit(f"{title}: failed with exit code {code}; complete output in {self.log}")

    def create(self) -> None:
        """The environment, anew unless the one that is there is of this Python and whole."""
        self.progress.begin("creating the environment")
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            if self.output(str(self.python), "-c", "import sys, pip; print(sys.version)").strip() == sys.version:
                return
        self.output(sys.executable, "-m", "venv", "--clear", str(self.venv))

    def find_uv(self) -> str | None:
        """uv's program, which pip fetches into the environment. Where it cannot be had: a line that says why, None."""
        self.progress.begin(f"fetching {UV}")
        uv = self.venv / "bin" / "uv"
        try:
            self.output(str(self.python), "-m", "pip", "install", "--quiet", "--no-compile", UV)
            self.output(str(uv), "--version")
        except (OSError, subprocess.CalledProcessError) as error:
            words = ((getattr(error, "output", None) or "").strip() or str(error)).splitlines()[-1]
            self.progress.say(f"{UV} cannot be had ({words}); pip installs the same, more slowly")
            return None
        config = self.output(str(self.python), "-m", "pip", "config", "list")
        self.environment = uv_environment(config, self.environment)
        return str(uv)

    def with_uv(self, uv: str) -> None:
        python = ("--python", str(self.python))
        arguments = compile_arguments(self.requirements, self.dev)
        self.run("choosing versions", uv, "pip", "compile", *python, *arguments, "--output-file", str(self.lock))
        self.check_disk(uv)
        # The list is complete, but for what SGLang would have beside it.
        install = (uv, "pip", "install", *python, "--no-deps")
        self.run(f"SGLang {self.version}", *install, "-r", str(self.lock), f"sglang=={self.version}")
        with alone():
            self.run("nsa-backend-plugin", *install, str(TORCHVISION_STUB), "--editable", ".")

    def check_disk(self, uv: str) -> None:
        """Say what will be downloaded, and stop where it does not fit."""
        [torch] = re.findall(r"^torch==\S+", self.lock.read_text(), re.MULTILINE)
        plan = self.output(uv, "pip", "install", "--python", str(self.python), "--no-deps", "--dry-run", torch)
        gigabytes = 1
        folders = [self.venv]
        if "Would download" in plan:  # not in uv's cache, whose files environments on the same disk share
            plain = "+" not in torch
            gigabytes = PLAIN_GB if plain else CPU_GB
            folders.append(Path(self.output(uv, "cache", "dir").strip()))
            if plain:
                self.progress.say(
                    f"{torch} is the plain build: about {PLAIN_DOWNLOAD_GB} GB to download, {PLAIN_GB} GB of disk; "
                    "README.md says how to offer a CPU build"
                )
        free = {folder: shutil.disk_usage(folder).free / 1e9 for folder in folders}
        if problem := disk_refusal(gigabytes, free):
            self.progress.finish()
            raise SystemExit(problem)

    def with_pip(self) -> None:
        self.progress.total = self.progress.step + 4 + self.dev
        free = shutil.disk_usage(self.venv).free / 1e9
        self.progress.say(
            f"with the plain build of torch, pip downloads {PLAIN_DOWNLOAD_GB} GB and fills {PLAIN_GB} GB of disk; "
            f"{self.venv} has {free:.1f} GB free"
        )
        # pip would compile every module of torch, transformers and SGLang, for over a minute; the first import, at the
        # end, compiles the quarter that a server needs.
        install = (str(self.python), "-m", "pip", "install", "--no-compile", "--progress-bar", "off")
        self.run(f"requirements of SGLang {self.version}", *install, "-r", str(self.requirements))
        self.run(f"SGLang {self.version}", *install, "--no-deps", f"sglang=={self.version}")
        with alone():
            self.run("nsa-backend-plugin", *install, str(TORCHVISION_STUB), "--editable", ".[dev]" if self.dev else ".")
        if self.dev:
            self.run("overrides", *install, "--no-deps", "-r", str(DEV_OVERRIDES))

    def first_import(self) -> None:
        """Compile what a server imports."""
        self.run("first import", str(self.python), "-c", "import sglang.launch_server, sglang.srt.managers.scheduler")


def install(venv: Path, version: str, requirements: Path, dev: bool, pip: bool, lines: bool) -> None:
    if problem := refusal(Host.here()):
        raise SystemExit(problem)
    if not requirements.exists():
        known = ", ".join(sorted(p.name[7:-8] for p in HERE.glob("sglang-*-cpu.txt")))
        raise SystemExit(f"SGLANG_VERSION={version!r}: expected one of {known}")
    want = stamp_of(requirements)
    stamps = {name: venv / f".stamp-{name}" for name in ("serve", "dev")}
    acceptable = [stamps["dev"]] if dev else list(stamps.values())
    if any(path.exists() and path.read_text() == want for path in acceptable):
        return
    progress = Progress(venv.name, 6, lines)
    installer = Installer(venv, version, requirements, dev, progress)
    threading.Thread(target=progress.run, daemon=True).start()
    try:
        installer.create()
        uv = None if pip else installer.find_uv()
        if uv:
            installer.with_uv(uv)
        else:
            installer.with_pip()
        installer.first_import()
    finally:
        progress.finish()
    stamps["dev" if dev else "serve"].write_text(want)
    print(f"{venv.name}: SGLang {version} and nsa-backend-plugin installed in {progress.seconds()} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path)
    parser.add_argument("version", metavar="SGLANG_VERSION")
    parser.add_argument("--dev", action="store_true", help="also what the tests and checks need")
    parser.add_argument("--pip", action="store_true", help="install with pip, without uv")
    parser.add_argument("--lines", action="store_true", help="new lines of progress, as side by side needs")
    parser.add_argument("--requirements", type=Path, metavar="FILE", help="of a release that has no file here")
    options = parser.parse_args()
    needs = options.requirements or requirements_of(options.version)
    try:
        install(options.venv.resolve(), options.version, needs.resolve(), options.dev, options.pip, options.lines)
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} failed with exit code {error.returncode}:\n{error.output}")
