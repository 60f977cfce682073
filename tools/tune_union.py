"""Find the constants of sharing rows among adjacent queries (`ops/sparse_mla/union.py`): check, then time.

    python -m tools.tune_union --out tune-union.json [--tokens 4096] [--tiny]

Of every overlap between neighbours it times Triton, which computes each query alone, this implementation as it is
served, and every tile when all is shared. From that come
  _union_kernel.TILES          the tile that is fastest where neighbours overlap most
  union.MOST_PERCENT           the union's share of all slots up to which sharing is faster; printed for every tile
  the preference of `ops/preferences.py`: the fewest tokens (--tokens) at which it gains, and costs little at overlap 0
A wrong result is reported and never timed. --tiny: minimal shapes, to check the script itself, also without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import environment
from benchmarks.timing import clock

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before ops are imported

import triton

from benchmarks.workloads import Problem, workload
from nsa_backend_plugin.ops.arch import device_arch
from nsa_backend_plugin.ops.sparse_mla import _union_kernel, _union_lists, union
from nsa_backend_plugin.ops.sparse_mla._union_kernel import Tile

OVERLAPS = (0, 50, 80, 95)
#: That fit sm_90's shared memory. The fourth spills up to 16 bytes a thread, the others nothing.
TILES = (Tile(64, 32, 8, 3), Tile(64, 32, 8, 4), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2))


def timed(problem: Problem, impl: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Microseconds of a call, or why there are none."""
    try:
        distance = problem.check(problem.run(impl, problem.inputs[0], True), problem.inputs[0])
    except triton.runtime.errors.OutOfResources as error:
        return {"problem": str(error).splitlines()[0]}
    if not distance <= problem.bar:
        return {"problem": f"wrong result: cosine distance {distance:.1e}"}
    calls = [partial(problem.run, impl, item, False) for item in problem.inputs]
    timing = clock.time_calls(calls, device, repeats=1 if tiny else 5, budget_s=0.2)
    return {"us": timing.median_us, "distance": distance}


def union_percent(problem: Problem, group: int) -> float:
    """Mean share of a group's slots that their union is, of the first groups."""
    indices = problem.inputs[0]["indices"][: 8 * group].cpu()
    unions = [part.unique().numel() for part in indices.split(group)]
    return 100 * sum(unions) / indices.numel()


def lists_us(problem: Problem, group: int, device: torch.device) -> float:
    """Microseconds of making the lists."""
    calls = [
        partial(_union_lists.build, device_arch(device), item["indices"], None, group=group, tile=32, most_percent=100)
        for item in problem.inputs
    ]
    return clock.time_calls(calls, device, repeats=3, budget_s=0.1).median_us


def tune(heads: int, tokens: int, device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    arch = device_arch(device)
    prefill = workload("sparse_prefill")
    chosen, served = _union_kernel.TILES[arch], union.MOST_PERCENT
    sizes = {"topk": 16, "context": 64, "pool_slots": 256} if tiny else {"context": max(4 * tokens, 16384)}
    rows = []
    for overlap in OVERLAPS[-1:] if tiny else OVERLAPS:
        asked = {"tokens": tokens, "heads": heads, "kv": "bf16", "overlap": overlap, "listed": True, **sizes}
        problem = prefill.build(prefill.complete(asked), device)
        case = {"heads": heads, "tokens": tokens, "overlap": overlap}
        alone = timed(problem, "triton", device, tiny)
        rows.append({**case, "what": "alone", **alone})
        rows.append({**case, "what": "as served", **timed(problem, "union", device, tiny)})
        union.MOST_PERCENT = dict.fromkeys(served, 100)
        for tile in (chosen,) if tiny else TILES:
            _union_kernel.TILES[arch] = tile
            group = _union_kernel.group_size(heads, tile)
            row = {**case, "what": str(tile), "group": group, **timed(problem, "union", device, tiny)}
            row |= {"lists_us": lists_us(problem, group, device), "union_percent": union_percent(problem, group)}
            if "us" in row and "us" in alone:
                row["gain"] = alone["us"] / row["us"]
                # Time beyond the lists grows with the union.
                row["even_percent"] = (
                    row["union_percent"] * (alone["us"] - row["lists_us"]) / (row["us"] - row["lists_us"])
                )
            rows.append(row)
        _union_kernel.TILES[arch], union.MOST_PERCENT = chosen, served
    return rows


def line(row: dict[str, Any]) -> str:
    name = f"heads={row['heads']} tokens={row['tokens']} overlap={row['overlap']}: {row['what']}"
    if "us" not in row:
        return f"{name}: {row['problem']}"
    if "gain" not in row:
        return f"{name}: {row['us']:.1f} us"
    return (
        f"{name}: {row['us']:.1f} us, {row['gain']:.2f}x, groups of {row['group']}, lists {row['lists_us']:.1f} us, "
        f"union {row['union_percent']:.0f}%, even at {row['even_percent']:.0f}%"
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Tune sharing rows among adjacent queries.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with every configuration's result")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--tiny", action="store_true", help="minimal shapes: checks the script, times nothing useful")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        import tools.triton_interpreter  # noqa: F401  (makes it convert floats as GPUs do)
    made_by = environment.collect(str(device))
    rows: list[dict[str, Any]] = []
    for heads in options.heads:
        for tokens in [4] if options.tiny else options.tokens:
            made = tune(heads, tokens, device, options.tiny)
            print(*map(line, made), sep="\n", flush=True)
            rows += made
            options.out.write_text(json.dumps({"environment": made_by, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
