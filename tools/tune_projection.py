"""Find how the CUDA projections divide their work on a GPU: check each variant, then time it.

    python -m tools.tune_projection --out tune-projection.json [--impl wgmma --only q_b_wq_b --tokens 1 8]

A variant that is not within the test's bar of the torch reference is reported and never timed. The table at the end has
the best variants of each implementation, shape and number of tokens; the one that is selected today is marked with *.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from benchmarks.run import environment
from benchmarks.timing import clock
from benchmarks.workloads import Problem
from benchmarks.workloads import projection as workload
from nsa_backend_plugin.ops import projection
from nsa_backend_plugin.ops._cuda import jit
from nsa_backend_plugin.ops.arch import core_count, device_arch
from nsa_backend_plugin.ops.projection import cuda, wgmma

BAR = 1e-3
NAMES = (*workload.SHAPES, "w_uk", "w_uv")
WARPS_OF_DEPTH, WARPS_OF_ROWS = (1, 2, 3, 4, 6, 7, 8, 12, 14, 16), (1, 2, 3, 4, 6, 8)


def variants_of_cuda(sizes: cuda._Sizes, tokens: int, arch: str, cores: int) -> Iterator[cuda._Variant]:
    """Today's, and those that differ in how warps, blocks and clusters share the depth and the rows."""
    today = next(v for v in cuda._variants(arch, sizes, cores) if 8 * v.token_tiles >= tokens)
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


def variants_of_wgmma(sizes: cuda._Sizes, tokens: int, arch: str, cores: int) -> Iterator[wgmma._Variant]:
    """Today's, and those that differ in warpgroups, stages and clusters, of at most three waves of blocks."""
    _, _, rows, blocks = sizes
    today = next(v for v in wgmma._variants(sizes, cores) if v.tokens >= tokens)
    yield today
    for cluster, warpgroups, stages in itertools.product(range(1, 9), (1, 2, 4), range(1, 8)):
        share = -(-blocks // cluster)
        passes = -(-share // warpgroups)
        if -(-blocks // share) != cluster or not min(2, passes) <= stages <= passes:
            continue
        found = today._replace(warpgroups=warpgroups, stages=stages, cluster=cluster, share=share)
        # On a multiprocessor, by wgmma.cu's registers and by shared memory; none where that does not fit.
        resident = min(3 if warpgroups == 1 else 4 // warpgroups, wgmma._SHARED_BYTES // found.shared_bytes)
        if found != today and -(-rows // wgmma._ROWS) * cluster <= 3 * cores * resident:
            yield found


class Implementation(NamedTuple):
    module: ModuleType
    names: tuple[str, ...]
    variants: Callable[[cuda._Sizes, int, str, int], Iterator[Any]]
    kernel: str
    token_keys: tuple[int, ...]  # of the result of its `_kernels`
    shown: tuple[str, ...]


IMPLEMENTATIONS = {
    "cuda": Implementation(
        *(cuda, NAMES, variants_of_cuda, "projection", cuda._TOKEN_TILES),
        ("warps_of_depth", "warps_of_rows", "blocks", "cluster"),
    ),
    "wgmma": Implementation(
        *(wgmma, tuple(workload.SHAPES), variants_of_wgmma, "multiply_tokens", wgmma._TOKENS),
        ("warpgroups", "stages", "cluster"),
    ),
}


def problem_of(name: str, tokens: int, heads: int, device: torch.device) -> Problem:
    build = workload.build_linear if name in workload.SHAPES else workload.build_per_head
    return build({"name": name, "tokens": tokens, "heads": heads, "min_sets": 2}, device)


def tune(impl: str, name: str, tokens: int, heads: int, device: torch.device) -> list[dict[str, Any]]:
    how, problem, arch = IMPLEMENTATIONS[impl], problem_of(name, tokens, heads, device), device_arch(device)
    chosen = list(how.variants(sizes_of(problem), tokens, arch, core_count(device)))
    kernels = jit.load_all(how.module._SOURCE, how.kernel, arch, list(map(how.module._defines, chosen)))
    rows = []
    selected = how.module._kernels
    try:
        for variant, kernel in zip(chosen, kernels, strict=True):
            how.module._kernels = lambda *_, one=(variant, kernel): dict.fromkeys(how.token_keys, one)
            row = {key: value for key, value in variant._asdict().items() if key != "kind"}
            row |= {"impl": impl, "name": name, "tokens": tokens, "heads": heads, "today": variant == chosen[0]}
            rows.append(row)
            row["error"] = problem.check(problem.run(impl, problem.inputs[0], True), problem.inputs[0])
            if not row["error"] <= BAR:
                print(f"wrong result: {row}")
                continue
            calls = [partial(problem.run, impl, item, False) for item in problem.inputs]
            row["us"] = clock.time_calls(calls, device, repeats=5, budget_s=0.05).median_us
    finally:
        how.module._kernels = selected
    return rows


def sizes_of(problem: Problem) -> cuda._Sizes:
    """Of the calls that are timed."""
    arguments = problem.inputs[0]
    operation = projection.linear if "weight_scale" in arguments else projection.per_head
    return cuda._sizes_of(operation.call(**arguments))


def table(rows: list[dict[str, Any]], best: int = 4) -> list[str]:
    lines, key_of = [], operator.itemgetter("name", "heads", "tokens", "impl")
    for key in dict.fromkeys(map(key_of, rows)):
        timed = sorted((row for row in rows if key_of(row) == key and "us" in row), key=lambda row: row["us"])
        lines.append(f"{key[0]} heads={key[1]} tokens={key[2]} {key[3]}")
        for row in [*timed[:best], *(row for row in timed[best:] if row["today"])]:
            how = " ".join(f"{k}={row[k]}" for k in IMPLEMENTATIONS[row["impl"]].shown)
            lines.append(f" {'*' if row['today'] else ' '} {row['us']:7.2f} us  {how}")
    return lines


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file with every variant's result")
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--tokens", nargs="+", type=int, choices=range(1, cuda.MAX_TOKENS + 1), default=[1, 8, 16, 32])
    parser.add_argument("--heads", type=int, default=16)
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device = torch.device("cuda", 0)
    for impl in options.impl:
        if reason := projection.linear.unavailable(impl, device):
            parser.error(f"{impl}: {reason}")
    made_by = environment.collect(str(device))
    rows: list[dict[str, Any]] = []
    for name, tokens, impl in itertools.product(options.only, options.tokens, options.impl):
        if name in IMPLEMENTATIONS[impl].names:
            rows += tune(impl, name, tokens, options.heads, device)
        options.out.write_text(json.dumps({"environment": made_by, "rows": rows}, indent=1))
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
