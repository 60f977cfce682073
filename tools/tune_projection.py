"""Find how the CUDA projection divides its work on a GPU: check each variant, then time it.

    python -m tools.tune_projection --out tune-projection.json [--only q_b --tokens 1 8]

A variant that is not within the test's bar of the torch reference is reported and never timed. The table at the end has
the best variants of each shape and number of tokens; the one that `projection.cuda` selects today is marked with *.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import environment
from benchmarks.timing import clock
from benchmarks.workloads import Problem
from benchmarks.workloads import projection as workload
from nsa_backend_plugin.ops import projection
from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.arch import core_count, device_arch
from nsa_backend_plugin.ops.projection import cuda

BAR = 1e-3
NAMES = (*workload.SHAPES, "w_uk", "w_uv")
WARPS_OF_DEPTH, WARPS_OF_ROWS = (1, 2, 3, 4, 6, 7, 8, 12, 14, 16), (1, 2, 3, 4, 6, 8)


def variants(today: cuda._Variant, sizes: cuda._Sizes, arch: str) -> Iterator[cuda._Variant]:
    """Today's, and those that differ in how warps, blocks and clusters share the depth and the rows."""
    yield today
    for cluster, at_once, of_depth, of_rows in itertools.product(
        (1, 2, 4, 8), (1, 2, 4), WARPS_OF_DEPTH, WARPS_OF_ROWS
    ):
        share = -(-sizes.blocks // cluster)
        if cluster > 1 and (sizes.kind.norm or sizes.blocks < cluster):
            continue
        if not 2 <= of_depth * of_rows <= 16 or at_once * of_depth >= share + at_once:
            continue
        found = today._replace(
            warps_of_depth=of_depth, warps_of_rows=of_rows, blocks=at_once, cluster=cluster, share=share
        )
        if found != today and found.shared_bytes <= cuda._shared_bytes(arch):
            yield found


def problem_of(name: str, tokens: int, heads: int, device: torch.device) -> Problem:
    build = workload.build_linear if name in workload.SHAPES else workload.build_per_head
    return build({"name": name, "tokens": tokens, "heads": heads, "min_sets": 2}, device)


def tune(name: str, tokens: int, heads: int, device: torch.device) -> list[dict[str, Any]]:
    problem, arch = problem_of(name, tokens, heads, device), device_arch(device)
    sizes = sizes_of(name, heads)
    today = next(v for v in cuda._variants(arch, sizes, core_count(device)) if 8 * v.token_tiles >= tokens)
    chosen = list(variants(today, sizes, arch))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a second each
        kernels = list(pool.map(lambda v: jit.load(cuda._SOURCE, ["projection"], arch, cuda._defines(v)), chosen))
    rows = []
    selected = cuda._kernels
    try:
        for variant, kernel in zip(chosen, kernels, strict=True):
            cuda._kernels = partial(_one, variant, kernel["projection"])  # type: ignore[assignment]
            row: dict[str, Any] = {"name": name, "tokens": tokens, "heads": heads, "today": variant == today}
            row |= {key: value for key, value in variant._asdict().items() if key != "kind"}
            rows.append(row)
            row["error"] = problem.check(problem.run("cuda", problem.inputs[0], True), problem.inputs[0])
            if not row["error"] <= BAR:
                print(f"wrong result: {row}")
                continue
            calls = [partial(problem.run, "cuda", item, False) for item in problem.inputs]
            row["us"] = clock.time_calls(calls, device, repeats=5, budget_s=0.05).median_us
    finally:
        cuda._kernels = selected
    return rows


def _one(variant: cuda._Variant, kernel: jit.Kernel, *_: Any) -> dict[int, tuple[cuda._Variant, jit.Kernel]]:
    return dict.fromkeys(cuda._TOKEN_TILES, (variant, kernel))


def sizes_of(name: str, heads: int) -> cuda._Sizes:
    """Of the call that the workload of a name makes."""
    if name in workload.SHAPES:
        sizes, fp8, norm = workload.SHAPES[name]
        rows, depth = sizes(heads)
        kind = cuda._Kind(fp8, norm, not fp8)
        return cuda._Sizes(kind, 1, rows, depth * (1 if fp8 else 2) // 128)
    rows, depth = (512, workload.NOPE) if name == "w_uk" else (workload.NOPE, 512)
    return cuda._Sizes(cuda._Kind(), heads, rows, 2 * depth // 128)


def table(rows: list[dict[str, Any]], best: int = 4) -> list[str]:
    lines = []
    for key in dict.fromkeys((row["name"], row["heads"], row["tokens"]) for row in rows):
        timed = sorted(
            (row for row in rows if (row["name"], row["heads"], row["tokens"]) == key and "us" in row),
            key=lambda row: row["us"],
        )
        lines.append(f"{key[0]} heads={key[1]} tokens={key[2]}")
        for row in [*timed[:best], *(row for row in timed[best:] if row["today"])]:
            how = " ".join(f"{k}={row[k]}" for k in ("warps_of_depth", "warps_of_rows", "blocks", "cluster"))
            lines.append(f" {'*' if row['today'] else ' '} {row['us']:7.2f} us  {how}")
    return lines


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file with every variant's result")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--tokens", nargs="+", type=int, choices=range(1, cuda.MAX_TOKENS + 1), default=[1, 8, 16, 32])
    parser.add_argument("--heads", type=int, default=16)
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device = torch.device("cuda", 0)
    if reason := projection.linear.unavailable("cuda", device):
        parser.error(reason)
    made_by = environment.collect(str(device))
    rows: list[dict[str, Any]] = []
    for name, tokens in itertools.product(options.only, options.tokens):
        rows += tune(name, tokens, options.heads, device)
        options.out.write_text(json.dumps({"environment": made_by, "rows": rows}, indent=1))
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
