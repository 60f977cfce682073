"""Every engine test and measurement of a GPU host, each in a process with a time limit: results in --out.

    python -m benchmarks engine --out benchmarks/results/engine
    python -m benchmarks engine --out results/ --only tests layers-fp8

Exits 1 when a step failed or ran out of time. The limits leave room above what the steps took on an H200 host.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.run.environment import REPO, of_children

TINY = REPO / "examples" / "models" / "tiny-dsa-2k"
_POINTS = "1:8192 16:8192 64:8192 1:32768 16:32768 1:131072"
_BATCHES = " ".join(f"{batch}:8192" for batch in (2, 4, 8, 32, 128))
_SWEEP = "1:1024 2:1024 8:1024 32:1024 64:1024 128:1024 1:8192 4:8192 16:8192 64:8192 1:32768 8:32768 1:131072 2:131072"
#: Name -> (limit in seconds, tests).
TESTS = {
    "tests": (400, "tests/engine/test_gpu.py"),
    "tests-speculative": (400, "tests/engine/test_speculative_gpu.py"),
    "tests-parallel": (300, "tests/engine/test_gpu_parallel.py"),
}
#: Name -> (limit in seconds, arguments of engine.measure). Twenty layers keep the GPU busier than the host.
MEASUREMENTS = {
    "layers-fp8": (
        200,
        f"layers --layers=4 --shapes {_POINTS} {_BATCHES} 64:131072 "
        "--arms nsa_plugin dsa 'nsa_plugin NSA_PLUGIN_DUAL_STREAM=0'",
    ),
    "layers-bf16": (150, f"layers --layers=4 --kv=bfloat16 --shapes {_POINTS}"),
    "layers-glm": (150, f"layers --layers=4 --family=glm --shapes {_POINTS}"),
    "served": (300, f"served --layers=20 --shapes {_SWEEP}"),
    "served-v3": (
        420,
        "served --family=v3 --kv=auto --shapes 1:8192 16:8192 64:8192 "
        "--arms nsa_plugin fa3 'nsa_plugin NSA_PLUGIN_DENSE_MLA_IMPL=triton' triton",
    ),
    "served-v3-128": (
        250,
        "served --family=v3 --kv=auto --heads=128 --shapes 64:8192 "
        "--arms 'nsa_plugin NSA_PLUGIN_DENSE_MLA_IMPL=triton' triton",
    ),
    "memory": (260, "served --layers=4 --label=memory --shared=130000 --tokens=2000 --shapes 64:131072"),
}
#: Arguments of the probe that runs under compute-sanitizer.
SANITIZED = (
    f"--prompts=3 --longest=2600 --batches 3 --variants -- --model-path={shlex.quote(str(TINY))} "
    "--attention-backend=nsa_plugin --kv-cache-dtype=fp8_e4m3 --disable-cuda-graph --max-total-tokens=32768 "
    "--max-running-requests=8 --sampling-backend=pytorch --grammar-backend=none"
)
END_SECONDS = 15


def commands(out: Path, force: bool = False) -> dict[str, tuple[int, list[str]]]:
    """Name -> (limit in seconds, command), in the order in which they run."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-v", "-s", "-m", "gpu"]
    steps = {name: (limit, [*pytest, path]) for name, (limit, path) in TESTS.items()}
    for name, (limit, text) in MEASUREMENTS.items():
        command, *words = shlex.split(text)
        steps[name] = (limit, [python, "-m", "benchmarks", command, f"--out={out}", *["--force"] * force, *words])
    memcheck = ["compute-sanitizer", "--tool=memcheck", "--report-api-errors=no", "--error-exitcode=9", python, "-m"]
    memcheck += ["tests.engine.gpu_probe", *shlex.split(SANITIZED)]
    if shutil.which("compute-sanitizer"):
        steps["memcheck"] = (300, memcheck)
    return steps


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks" / "results" / "engine")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="default: all of them")
    parser.add_argument("--force", action="store_true", help="replace results files that exist")
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    steps = commands(options.out.resolve(), options.force)
    unknown = sorted(set(options.only or ()) - set(steps))
    if unknown:
        parser.error(f"--only {unknown[0]}: expected some of {', '.join(steps)}")
    codes = {name: _run(name, *steps[name], options.out) for name in options.only or steps}
    return int(any(codes.values()))


def _run(name: str, limit: int, command: list[str], out: Path) -> int:
    """Exit code; 124 when the limit was reached. The output goes to a log and its end to stdout."""
    env = of_children()
    if name == "memcheck":
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor its own allocation, with its own bounds
    log = out / f"{name}.log"
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=REPO, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = 124
            _end(process)
    print("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
    print(f"== {name}: exit code {code} after {time.monotonic() - start:.0f} s", flush=True)
    return code


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM first: a step then ends the servers that it started."""
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
