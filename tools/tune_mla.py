"""Find tile sizes and split counts of the Triton MLA kernels: check each configuration, then time it.

    python -m tools.tune_mla --out tune-mla.json [--only dense] [--tiny]

Every configuration is compared with the torch reference on a few rows before it is timed; a wrong one is reported
and never timed. The table at the end lists the best configurations of each shape, the one that `mla_launch` selects
today marked with *. --tiny runs minimal shapes, also in Triton's interpreter, to check the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.run import environment

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before ops are imported

from benchmarks.workloads import workload
from nsa_backend_plugin.ops._triton import mla_launch
from nsa_backend_plugin.ops._triton.mla_launch import Tile
from nsa_backend_plugin.ops.arch import core_count, device_arch
from tools.tune_union import timed

TILES = {
    ("bf16", 16): [Tile(16, 64, 4, 3), Tile(16, 64, 8, 5), Tile(16, 32, 4, 3), Tile(16, 32, 4, 5)],
    ("bf16", 32): [Tile(32, 64, 8, 3), Tile(32, 32, 8, 4), Tile(16, 64, 4, 3)],
    ("bf16", 64): [Tile(64, 64, 8, 2), Tile(64, 32, 8, 3), Tile(32, 64, 8, 3)],
    ("packed", 16): [Tile(16, 32, 8, 2), Tile(16, 32, 8, 3), Tile(16, 32, 4, 3), Tile(16, 64, 8, 3)],
}


class Shape(NamedTuple):
    """A case of a workload. keys: top-k (sparse) or context length (dense)."""

    workload: str
    kv: str
    rows: int
    heads: int
    keys: int = 2048

    def __str__(self) -> str:
        return f"{self.workload} {self.kv} rows={self.rows} heads={self.heads} keys={self.keys}"

    @property
    def params(self) -> dict[str, Any]:
        if self.workload == "dense_decode":
            return {"batch_spec": f"{self.rows}q1s{self.keys}", "heads": self.heads, "kv": self.kv}
        return {"tokens": self.rows, "heads": self.heads, "topk": self.keys, "kv": self.kv}


def shapes(tiny: bool) -> list[Shape]:
    if tiny:
        return [Shape("sparse_decode", "bf16", 1, 8, 70), Shape("dense_decode", "bf16", 2, 8, 70)]
    decode = [Shape("sparse_decode", "bf16", rows, 16) for rows in (1, 8, 32, 64, 128)]
    decode += [Shape("sparse_decode", "bf16", rows, heads) for heads in (32, 64) for rows in (8, 64, 128)]
    decode += [Shape("sparse_decode", "packed", rows, 16) for rows in (1, 32, 128)]
    prefill = [Shape("sparse_prefill", "bf16", 4096, heads) for heads in (8, 16)]
    dense = [Shape("dense_decode", "bf16", 1, 16, 8192)]
    dense += [Shape("dense_decode", "bf16", 128, heads, 8192) for heads in (16, 64, 128)]
    return decode + prefill + dense


def configurations(shape: Shape, device: torch.device) -> list[tuple[Tile, int]]:
    """Tiles to try, each at half, once and twice the split count of the rule; today's choice first."""
    kind = "pages" if shape.workload == "dense_decode" else shape.kv
    today = mla_launch.tile(device_arch(device), kind, shape.heads)
    head_tile = 16 if shape.heads <= 16 else 32 if shape.heads <= 32 else 64
    found: dict[tuple[Tile, int], None] = {}
    for config in [today, *TILES[shape.kv, head_tile]]:
        splits = mla_launch.split_count(core_count(device), shape.rows, shape.heads, shape.keys, config)
        for choice in (splits, splits * 2, splits // 2):
            if 1 <= choice <= mla_launch.MAX_FORCED_SPLITS:
                found[config, choice] = None
    return list(found)


def tune(shape: Shape, device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    kind = workload(shape.workload)
    problem = kind.build(kind.complete(shape.params | ({"pool_slots": 256} if tiny else {})), device)
    rows: list[dict[str, Any]] = []
    for config, splits in configurations(shape, device)[: 1 if tiny else None]:
        row: dict[str, Any] = {"shape": str(shape), **asdict(config), "splits": splits, "today": not rows}
        with mock.patch.multiple(mla_launch, tile=lambda *_, t=config: t, split_count=lambda *_, n=splits: n):
            row |= timed(problem, "triton", device, tiny)
        rows.append(row)
        if "us" in row:
            row["gbps"] = problem.bytes / row["us"] / 1e3
        else:
            print(f"{shape} {config} splits={splits}: {row['problem']}")
    return rows


def table(rows: list[dict[str, Any]], best: int = 4) -> list[str]:
    """Lines of the best configurations per shape, and of today's choice."""
    lines = []
    for name in dict.fromkeys(r["shape"] for r in rows):
        fastest = sorted((r for r in rows if r["shape"] == name and "us" in r), key=lambda r: r["us"])
        lines.append(name)
        for r in [*fastest[:best], *(r for r in fastest[best:] if r["today"])]:
            mark = "*" if r["today"] else " "
            config = f"heads={r['heads']} keys={r['keys']} warps={r['num_warps']} stages={r['num_stages']}"
            lines.append(f" {mark} {r['us']:8.1f} us {r['gbps']:6.0f} GB/s  {config} splits={r['splits']}")
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Tune the Triton MLA kernels.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with every configuration's result")
    parser.add_argument("--only", default="", help="shapes whose description contains this text")
    parser.add_argument("--tiny", action="store_true", help="minimal shapes: checks the script, times nothing useful")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        import tools.triton_interpreter  # noqa: F401  (makes it convert floats as GPUs do)
    made_by = environment.collect(str(device))
    rows: list[dict[str, Any]] = []
    for shape in shapes(options.tiny):
        if options.only in str(shape):
            rows += tune(shape, device, options.tiny)
            options.out.write_text(json.dumps({"environment": made_by, "rows": rows}, indent=1))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
