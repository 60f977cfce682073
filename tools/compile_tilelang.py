"""Lower every TileLang kernel to the device source of GPUs that are not here, on a machine without a GPU.

    python -m tools.compile_tilelang [--targets gfx942 gfx950 sm_90] [--sources DIR]
    python -m tools.compile_tilelang --write-table docs/tilelang_table.csv

TileLang schedules, places tiles in shared memory, picks matrix instructions and writes HIP or CUDA C++ without a device
or a vendor's compiler; registers and spills are known only after hipcc or nvcc. Exits 1 when a kernel does not lower,
has no matrix instruction, or needs more shared memory than the target has. `--sources` keeps the files for a compiler.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_backend_plugin.ops.arch import arch_fp8_dtype, is_cuda
from nsa_backend_plugin.ops.sparse_mla import tilelang as sparse_mla
from tools.compile_matrix import hardware

DEFAULT_TARGETS = ("gfx942", "gfx950", "sm_90")
_COLUMNS = ("target", "kernel", "threads", "shared_bytes", "matrix_instructions")
_MATRIX_INSTRUCTIONS = {
    "hip": re.compile(r"__builtin_amdgcn_(mfma_\w+)"),
    "cuda": re.compile(r"\b(mma_sync|wgmma_ss|wgmma_rs)\b"),
}
#: The only type that the kernels keep there.
_STATIC_SHARED = re.compile(r"\b__shared__ (?:__align__\(\d+\) )?int \w+\[(\d+)\];")


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration that the adapter can launch. `program` builds the TileLang function."""

    name: str
    program: Callable[[], Any]
    multiplies: bool


@dataclass(frozen=True)
class Lowered:
    target: str
    kernel: str
    threads: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]
    source: str
    problem: str = ""

    def row(self) -> tuple[str, ...]:
        counts = (str(self.threads), str(self.shared_bytes))
        return (self.target, self.kernel, *counts, " ".join(self.matrix_instructions))


def cases(arch: str) -> Iterator[Case]:
    """Tiles and row types of `sparse_mla`: more heads add blocks, a bf16 result rounds the store."""
    kinds = ["bfloat16", sparse_mla.NAMES[arch_fp8_dtype(arch)], *(["packed"] if is_cuda(arch) else [])]
    tiles = {tile.heads: tile for tile in (sparse_mla.tile(arch, heads) for heads in (16, 32, 128))}
    attend = [(heads, kv, "float32") for heads in tiles for kv in kinds] + [(16, "bfloat16", "bfloat16")]
    for heads, kv, out in attend:
        program = functools.partial(sparse_mla.attend_program, heads, tiles[heads], kv, out, arch)
        yield Case(f"sparse_mla.attend {kv} heads={heads} out={out}", program, True)
    for parts in sparse_mla.MERGES:
        yield Case(f"sparse_mla.merge {parts}", functools.partial(sparse_mla.merge_program, 16, parts, arch), False)


def lower(arch: str, case: Case) -> Lowered:
    """Device source of one case, and what it says of itself."""
    import tilelang
    from tilelang import tvm

    target = sparse_mla.target(arch)
    with tvm.target.Target(target), tilelang.transform.PassContext(config=sparse_mla.PASS_CONFIGS):
        lowered = tilelang.lower(case.program(), target=target)
    [kernel] = lowered.device_mod.functions.values()
    extent = kernel.attrs["thread_extent"]
    shared = int(kernel.attrs["dyn_shared_memory_buf"]) if "dyn_shared_memory_buf" in kernel.attrs else 0
    shared += sum(4 * int(count) for count in _STATIC_SHARED.findall(lowered.kernel_source))
    found = sorted(set(_MATRIX_INSTRUCTIONS["cuda" if is_cuda(arch) else "hip"].findall(lowered.kernel_source)))
    limit = hardware(arch).shared_per_program
    problems = [
        f"needs {shared} bytes of shared memory, {arch} has {limit}" if shared > limit else "",
        "no matrix instruction" if case.multiplies and not found else "",
    ]
    return Lowered(
        target=arch,
        kernel=case.name,
        threads=int(extent["threadIdx.x"]),
        shared_bytes=shared,
        matrix_instructions=tuple(found),
        source=lowered.kernel_source,
        problem="; ".join(filter(None, problems)),
    )


def lower_all(targets: Sequence[str]) -> Iterator[Lowered]:
    for arch in targets:
        for case in cases(arch):
            try:
                yield lower(arch, case)
            except Exception as error:  # one broken case must not hide the others' results
                reason = f"does not lower: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                yield Lowered(arch, case.name, 0, 0, (), "", reason)


def table(results: Sequence[Lowered]) -> str:
    """CSV text of the results."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(result.row() for result in results)
    return text.getvalue()


def _keep_source(folder: pathlib.Path, result: Lowered) -> None:
    suffix = "cu" if is_cuda(result.target) else "hip"
    name = re.sub(r"\W+", "_", f"{result.target} {result.kernel}")
    (folder / f"{name}.{suffix}").write_text(result.source)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Lower every TileLang kernel for GPUs that are not here.")
    parser.add_argument("--targets", nargs="+", default=DEFAULT_TARGETS, metavar="ARCH")
    parser.add_argument("--sources", metavar="DIR", type=pathlib.Path, help="keep each kernel's source there")
    parser.add_argument("--write-table", metavar="CSV", type=pathlib.Path, help="write the results to this table")
    arguments = parser.parse_args(argv)
    results = []
    for result in lower_all(arguments.targets):
        print(*result.row(), f"PROBLEM: {result.problem}" if result.problem else "", sep=" | ", flush=True)
        results.append(result)
        if arguments.sources and result.source:
            arguments.sources.mkdir(parents=True, exist_ok=True)
            _keep_source(arguments.sources, result)
    if arguments.write_table:
        arguments.write_table.write_text(table(results))
    problems = sum(bool(result.problem) for result in results)
    print(f"{len(results)} kernels lowered, {problems} with problems")
    return 1 if problems or not results else 0


if __name__ == "__main__":
    sys.exit(main())
