"""Compile every Triton kernel in every configuration of the tuning tables, on a machine without a GPU.

    python -m tools.compile_matrix [--targets sm_90 gfx942 | all] [--ops concat] [--json FILE]
    python -m tools.compile_matrix --targets all --write-table docs/compile_table.csv    # what has changed since
    python -m tools.compile_matrix --targets sm_80 --sample 9 --check-table docs/compile_table.csv

Prints registers, spills, shared memory, matrix instructions and an occupancy estimate of each `CompileCase`; exits 1
when a kernel does not compile, spills, or needs more shared memory than the target has. Triton caches compiled
kernels, so a second run is quick. TRITON_INTERPRET must not be set: interpreted kernels have no code to compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import BaseBackend
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from nsa_backend_plugin import settings
from nsa_backend_plugin.ops._triton.support import interpreted
from nsa_backend_plugin.ops.arch import is_cuda
from nsa_backend_plugin.ops.dispatch import implementation_names
from tools import compile_cases, compile_table
from tools.compile_cases import MAY_SPILL, CompileCase, gpu_target

DEFAULT_TARGETS = ("sm_90", "sm_100", "gfx942", "gfx950")
#: `--targets all`: also what the kernels claim without being tuned for it.
ALL_TARGETS = (*DEFAULT_TARGETS, "sm_80", "sm_89", "sm_120", "gfx1201")


@dataclass(frozen=True)
class Hardware:
    """What limits the number of resident programs. shared_* in bytes; warps are wavefronts on AMD."""

    shared_per_program: int
    shared_per_core: int
    warps_per_scheduler: int


# Of every target.
_SCHEDULERS = 4
_REGISTERS = 512  # of a lane, divided among the warps of a scheduler
_GRANULE = 8  # registers
# Sources: CUDA programming guide, table of compute capabilities; AMD CDNA 3/4 and RDNA 4 ISA guides.
_HARDWARE = {
    "sm_80": Hardware(163 * 1024, 164 * 1024, 16),
    "sm_90": Hardware(227 * 1024, 228 * 1024, 16),
    "sm_100": Hardware(227 * 1024, 228 * 1024, 16),
    "gfx950": Hardware(160 * 1024, 160 * 1024, 8),
}
_SMALLEST_CUDA = Hardware(99 * 1024, 100 * 1024, 12)  # sm_86, sm_89, sm_120
_SMALLEST_AMD = Hardware(64 * 1024, 64 * 1024, 8)  # gfx90a, gfx942

_MATRIX_INSTRUCTIONS = {
    "ptx": re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[^\n;]*?\.(m\d+n\d+k\d+|kind::\w+)"),
    "amdgcn": re.compile(r"\b(v_s?mfmac?_\w+|v_wmma_\w+)"),
}


def hardware(arch: str) -> Hardware:
    return _HARDWARE.get(arch, _SMALLEST_CUDA if is_cuda(arch) else _SMALLEST_AMD)


@dataclass(frozen=True)
class Result:
    """One compiled case. `occupancy` is the share of the hardware's warp slots that can be resident at once."""

    target: str
    op: str
    case: str
    warps: int
    stages: int
    registers: int  # per lane; VGPR and AGPR together on AMD
    spill_bytes: int  # stack (CUDA) or scratch (AMD) per lane
    shared_bytes: int
    matrix_instructions: tuple[str, ...]
    occupancy: float
    source: str  # see `fingerprint`
    problem: str = ""


def _source(case: CompileCase, backend: BaseBackend) -> ASTSource:
    names = case.kernel.arg_names
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    attributes = {(names.index(n),): backend.parse_attr(known) for n, known in case.known.items()}
    return ASTSource(case.kernel, signature, dict(case.constexprs), attributes)


def fingerprint(case: CompileCase) -> str:
    """Of all that a case is compiled from, and with: what has the same one becomes the same code.

    The kernel's source, the functions it calls, the values of the constants these name, the configuration, and Triton.
    """
    sources: dict[int, str] = {}

    def read(function: JITFunction) -> None:
        code, named = function.fn.__code__, function.fn.__globals__
        sources[id(function)] = function.src
        for name in sorted({*code.co_names, *code.co_freevars} & named.keys()):
            value = named[name]
            if isinstance(value, JITFunction):
                if id(value) not in sources:
                    read(value)
            elif isinstance(value, int | float | str | triton.language.constexpr):
                sources[id(function)] += f"\n{name} = {value!r}"

    read(case.kernel)
    for value in case.constexprs.values():
        if isinstance(value, JITFunction):
            read(value)
    configuration = dataclasses.asdict(dataclasses.replace(case, name="", kernel=None))
    del configuration["resident"]  # a bar on what is compiled
    text = "\n".join([triton.__version__, *sorted(sources.values())])
    text += json.dumps(configuration, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _cuda_resources(compiled: Any) -> tuple[int, int]:
    """(registers, stack bytes) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout)
    assert found, text.stdout
    return int(found[1]), int(found[2])


def _amd_resources(compiled: Any) -> tuple[int, int]:
    """(vector registers, scratch bytes) from the assembly's kernel description."""
    text = compiled.asm["amdgcn"]
    registers = re.search(r"; TotalNumVgprs: (\d+)", text) or re.search(r"\.vgpr_count:\s+(\d+)", text)
    scratch = re.search(r"\.private_segment_fixed_size: (\d+)", text)
    assert registers, "no register count in the assembly"
    assert scratch, "no scratch size in the assembly"
    return int(registers[1]), int(scratch[1])


def warp_slots(arch: str) -> int:
    return hardware(arch).warps_per_scheduler * _SCHEDULERS


def occupancy(arch: str, registers: int, shared_bytes: int, warps: int) -> float:
    """Share of the warp slots of a core that programs of this size can fill."""
    limits, slots = hardware(arch), warp_slots(arch)
    allocated = -(-max(registers, 1) // _GRANULE) * _GRANULE
    by_registers = min(_REGISTERS // allocated, limits.warps_per_scheduler) * _SCHEDULERS // warps
    by_shared = limits.shared_per_core // shared_bytes if shared_bytes else slots
    return min(by_registers, by_shared) * warps / slots


def too_few(arch: str, case: CompileCase, share: float, warps: int) -> str:
    """What is wrong if a core of this occupancy holds fewer programs than the grid counts on: a second wave of them."""
    held = round(share * warp_slots(arch) / warps)
    return f"a core holds {held} programs, the grid counts on {case.resident}" if held < case.resident else ""


def compile_case(arch: str, op: str, case: CompileCase) -> Result:
    target = gpu_target(arch)
    compiled = triton.compile(_source(case, make_backend(target)), target=target, options=dict(case.options))
    registers, spill = _cuda_resources(compiled) if is_cuda(arch) else _amd_resources(compiled)
    made, limit = compiled.metadata, hardware(arch).shared_per_program
    code = "ptx" if is_cuda(arch) else "amdgcn"
    found = _MATRIX_INSTRUCTIONS[code].findall(compiled.asm[code])
    share = occupancy(arch, registers, made.shared, made.num_warps)
    problems = [
        f"spills {spill} bytes per lane" if spill > MAY_SPILL.get((arch, case.kernel.__name__), 0) else "",
        too_few(arch, case, share, made.num_warps),
        f"needs {made.shared} bytes of shared memory, {arch} has {limit}" if made.shared > limit else "",
    ]
    return Result(
        target=arch,
        op=op,
        case=case.name,
        warps=made.num_warps,
        stages=made.num_stages,
        registers=registers,
        spill_bytes=spill,
        shared_bytes=made.shared,
        matrix_instructions=tuple(sorted({f if isinstance(f, str) else ".".join(f) for f in found})),
        occupancy=share,
        source=fingerprint(case),
        problem="; ".join(filter(None, problems)),
    )


def _failed(arch: str, op: str, case: CompileCase, error: Exception) -> Result:
    reason = f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return Result(arch, op, case.name, 0, 0, 0, 0, 0, (), 0.0, fingerprint(case), reason)


def kernel_modules(ops: Sequence[str]) -> dict[str, ModuleType]:
    """Operation -> its triton.py, for the operations that have one."""
    return {
        op: importlib.import_module(f"nsa_backend_plugin.ops.{op}.triton")
        for op in ops
        if "triton" in implementation_names(op)
    }


def all_cases(targets: Sequence[str], modules: Mapping[str, ModuleType]) -> Iterator[tuple[str, str, CompileCase]]:
    """(target, operation, case): every case of every module for every target that the module's kernels support."""
    for arch in targets:
        for op, module in modules.items():
            if module.available(arch) is None:
                yield from ((arch, op, case) for case in compile_cases.cases(op, arch))


def compile_all(cases: Iterable[tuple[str, str, CompileCase]]) -> Iterator[Result]:
    for arch, op, case in cases:
        try:
            yield compile_case(arch, op, case)
        except Exception as error:  # one broken case must not hide the others' results
            yield _failed(arch, op, case, error)


def _line(result: Result) -> str:
    numbers = f"{result.warps:>2}w {result.stages}s {result.registers:>4} reg {result.spill_bytes:>4} spill"
    memory = f"{result.shared_bytes:>7} B shared {result.occupancy:>4.0%} occupancy"
    label = f"{result.target:<7} {result.op}.{result.case}"
    return f"{label:<78} {numbers} {memory}  {' '.join(result.matrix_instructions)}"


def _one_process_per_target(arguments: argparse.Namespace) -> int:
    """The table's numbers: LLVM keeps state from one target to the next in a process, and registers shift with it."""
    flags = ["--ops", *arguments.ops]
    for name, path in (("--check-table", arguments.check_table), ("--write-table", arguments.write_table)):
        flags += [name, str(path)] if path else []
    flags += ["--sample", str(arguments.sample)] if arguments.sample is not None else []
    module = [sys.executable, "-m", "tools.compile_matrix"]
    return max(subprocess.run([*module, "--targets", t, *flags], check=False).returncode for t in arguments.targets)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for GPUs that are not here.")
    parser.add_argument("--targets", nargs="+", default=DEFAULT_TARGETS, metavar="ARCH")
    parser.add_argument("--ops", nargs="+", default=settings.OPERATIONS, choices=settings.OPERATIONS, metavar="OP")
    parser.add_argument(
        "--sample",
        metavar="N",
        type=int,
        help="compile N random cases of each target; the table is held to the sources of all",
    )
    parser.add_argument("--json", metavar="FILE", type=pathlib.Path, help="also write the results to FILE")
    parser.add_argument("--check-table", metavar="CSV", type=pathlib.Path, help="fail if its rows differ")
    parser.add_argument(
        "--write-table",
        metavar="CSV",
        type=pathlib.Path,
        help="compile what it does not have, or has of another source, and put it there",
    )
    arguments = parser.parse_args(argv)
    if arguments.targets == ["all"]:
        arguments.targets = ALL_TARGETS
    for arch in arguments.targets:
        gpu_target(arch)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: unset it to compile")
    if len(arguments.targets) > 1 and (arguments.check_table or arguments.write_table):
        return _one_process_per_target(arguments)
    if arguments.sample is not None and arguments.write_table:
        parser.error("--sample does not compile what --write-table needs")
    cases = list(all_cases(arguments.targets, kernel_modules(arguments.ops)))
    sources = {(arch, f"{op}.{case.name}"): fingerprint(case) for arch, op, case in cases}
    chosen = cases
    if arguments.sample is not None:
        chosen = random.sample(cases, min(arguments.sample, len(cases)))
    elif arguments.write_table:
        known = compile_table.sources(arguments.write_table)
        chosen = [case for case, key in zip(cases, sources, strict=True) if known.get(key) != sources[key]]
    results = []
    for result in compile_all(chosen):
        print(_line(result), f"PROBLEM: {result.problem}" if result.problem else "", flush=True)
        results.append(result)
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")
    scope = (arguments.targets, arguments.ops, sources)
    if arguments.write_table:
        compile_table.write(arguments.write_table, results, *scope)
    changes = []
    if arguments.check_table:
        changes = compile_table.differences(arguments.check_table, results, *scope)
        held = compile_table.occupancies(arguments.check_table)
        for (arch, op, case), key in zip(cases, sources, strict=True):
            if key in held and (words := too_few(arch, case, *held[key])):
                changes.append(f"{arch} {op}.{case.name}: {words}")
    if changes:
        print(f"{arguments.check_table} differs, --write-table renews it:", *changes, sep="\n")
    problems = sum(bool(r.problem) for r in results)
    print(f"{len(results)} kernels compiled, {problems} with problems")
    return 1 if problems or changes or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
