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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.run import environment
from benchmarks.timing import clock

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before ops are imported

import triton

from nsa_backend_plugin.ops import dense_mla, latent_cache, sparse_mla
from nsa_backend_plugin.ops._triton import mla_launch
from nsa_backend_plugin.ops._triton.mla_launch import Tile
from nsa_backend_plugin.ops.arch import core_count, device_arch
from tools.calls import HEAD_DIM, SOFTMAX_SCALE, Calls, int32

VALUE_DIM = 512
PAGE_SIZE = 64
#: Squared relative error that a configuration may have: twice the cosine bars of the tests.
ERROR_BARS = {"bf16": 1e-5, "packed": 4e-4}
CHECKED_ROWS = 4

TILES = {
    ("bf16", 16): [
        Tile(16, 64, 4, 3),
        Tile(16, 64, 8, 5),
        Tile(16, 32, 4, 3),
        Tile(16, 32, 4, 5),
    ],
    ("bf16", 32): [
        Tile(32, 64, 8, 3),
        Tile(32, 32, 8, 4),
        Tile(16, 64, 4, 3),
    ],
    ("bf16", 64): [
        Tile(64, 64, 8, 2),
        Tile(64, 32, 8, 3),
        Tile(32, 64, 8, 3),
    ],
    ("packed", 16): [
        Tile(16, 32, 8, 2),
        Tile(16, 32, 8, 3),
        Tile(16, 32, 4, 3),
        Tile(16, 64, 8, 3),
    ],
}


@dataclass(frozen=True)
class Shape:
    """One shape to tune. keys: top-k (sparse) or context length (dense). slots: rows of the cache."""

    op: str
    kind: str
    rows: int
    heads: int
    keys: int
    slots: int

    def __str__(self) -> str:
        return f"{self.op} {self.kind} rows={self.rows} heads={self.heads} keys={self.keys}"


def shapes(tiny: bool) -> list[Shape]:
    if tiny:
        return [Shape("sparse", "bf16", 1, 8, 70, 200), Shape("dense", "bf16", 2, 8, 70, 256)]
    pool = 1_200_000
    decode = [Shape("sparse", "bf16", rows, 16, 2048, pool) for rows in (1, 8, 32, 64, 128)]
    decode += [Shape("sparse", "bf16", rows, heads, 2048, pool) for heads in (32, 64) for rows in (8, 64, 128)]
    decode += [Shape("sparse", "packed", rows, 16, 2048, pool) for rows in (1, 32, 128)]
    prefill = [Shape("sparse", "bf16", 4096, heads, 2048, 32_768) for heads in (8, 16)]
    dense = [Shape("dense", "bf16", 1, 16, 8192, 1 << 20)]
    dense += [Shape("dense", "bf16", 128, heads, 8192, 1 << 20) for heads in (16, 64, 128)]
    return decode + prefill + dense


#: Of one layer's call: an operation's checked arguments.
Inputs = sparse_mla.Attend | dense_mla.Decode


def make_cache(shape: Shape, device: torch.device) -> torch.Tensor:
    kv = torch.empty(shape.slots, 1, HEAD_DIM, dtype=torch.bfloat16, device=device).normal_()
    return latent_cache.quantize(kv) if shape.kind == "packed" else kv


def make_inputs(shape: Shape, kv: torch.Tensor, buffers: dict[str, torch.Tensor]) -> Inputs:
    make, lengths = Calls(kv.device), [shape.keys] * shape.rows
    if shape.op == "dense":
        return dense_mla.decode.call(**make.dense_mla_decode(lengths, shape.heads, PAGE_SIZE, kv=kv), **buffers)
    slots = torch.randint(shape.slots, (shape.rows, shape.keys), dtype=torch.int32, device=kv.device)
    arguments = make.sparse_mla_attend(shape.rows, shape.heads, shape.keys, kv=kv, indices=slots)
    return sparse_mla.attend.call(**arguments, lengths=int32(lengths, kv.device), **buffers)


def attend(shape: Shape, config: Tile, splits: int, call: Inputs) -> None:
    """A call with one configuration."""
    dense = isinstance(call, dense_mla.Decode)
    mla_launch.attend(
        call,
        call.block_table if dense else call.indices,
        call.seq_lens if dense else call.lengths,
        kind=shape.kind,
        kv_scale=None,
        page_size=PAGE_SIZE if dense else 0,
        config=config,
        splits=splits,
    )


def expected(call: Inputs) -> torch.Tensor:
    """float32 output of the reference for the first CHECKED_ROWS rows."""
    q = call.q[:CHECKED_ROWS].float()
    if isinstance(call, dense_mla.Decode):
        table, lengths = call.block_table[:CHECKED_ROWS], call.seq_lens[:CHECKED_ROWS]
        out = dense_mla.decode(q, call.kv.float(), table, lengths, SOFTMAX_SCALE, page_size=PAGE_SIZE, impl="torch")
    else:
        kv = call.kv if call.kind == "packed" else call.kv.float()
        out = sparse_mla.attend(q, kv, call.indices[:CHECKED_ROWS], SOFTMAX_SCALE, impl="torch")
    assert isinstance(out, torch.Tensor)
    return out


def configurations(shape: Shape, device: torch.device) -> list[tuple[Tile, int]]:
    """Tiles to try, each at half, once and twice the split count of the rule; today's choice first."""
    today = mla_launch.tile(device_arch(device), "pages" if shape.op == "dense" else shape.kind, shape.heads)
    head_tile = 16 if shape.heads <= 16 else 32 if shape.heads <= 32 else 64
    tiles = TILES[shape.kind, head_tile]
    found: dict[tuple[Tile, int], None] = {}
    for config in [today, *tiles]:
        splits = mla_launch.split_count(core_count(device), shape.rows, shape.heads, shape.keys, config)
        for choice in (splits, splits * 2, splits // 2):
            if 1 <= choice <= mla_launch.MAX_FORCED_SPLITS:
                found[config, choice] = None
    return list(found)


def tune(shape: Shape, device: torch.device, log: Callable[[str], None], tiny: bool) -> list[dict[str, Any]]:
    kv = make_cache(shape, device)
    row_bytes = 656 if shape.kind == "packed" else 2 * HEAD_DIM
    bytes_read = shape.rows * shape.keys * row_bytes
    cap, repeats = (1, 1) if tiny else (24, 5)
    count = clock.input_sets(bytes_read, 4 * shape.rows * (shape.keys + shape.heads * HEAD_DIM), device, cap=cap)
    chosen = configurations(shape, device)[: 1 if tiny else None]
    most = max(splits for _, splits in chosen)
    size = mla_launch.scratch_bytes(shape.rows * most, shape.heads, VALUE_DIM)
    out = torch.empty(shape.rows, shape.heads, VALUE_DIM, dtype=torch.bfloat16, device=device)
    buffers = {"out": out, "workspace": torch.empty(size, dtype=torch.uint8, device=device)}
    sets = [make_inputs(shape, kv, buffers) for _ in range(count)]
    want = expected(sets[0])
    results: list[dict[str, Any]] = []
    for config, splits in chosen:
        row: dict[str, Any] = {"shape": str(shape), **asdict(config), "splits": splits, "today": not results}
        results.append(row)
        out.fill_(float("nan"))
        call = partial(attend, shape, config, splits)
        try:
            call(sets[0])
        except triton.runtime.errors.OutOfResources as error:
            row["problem"] = str(error).splitlines()[0]
            continue
        got = out[:CHECKED_ROWS].float()
        error_share = float((got - want).square().sum() / want.square().sum())
        row["error"] = error_share
        if not error_share <= ERROR_BARS[shape.kind]:
            row["problem"] = f"wrong result: squared relative error {error_share:.1e}"
            log(f"{shape} {config} splits={splits}: {row['problem']}")
            continue
        timing = clock.time_calls([partial(call, i) for i in sets], device, repeats=repeats, budget_s=0.2)
        row["us"] = timing.median_us
        row["gbps"] = bytes_read / timing.median_us / 1e3
    return results


def table(rows: list[dict[str, Any]], best: int = 4) -> list[str]:
    """Lines of the best configurations per shape, and of today's choice."""
    lines = []
    for name in dict.fromkeys(r["shape"] for r in rows):
        timed = sorted((r for r in rows if r["shape"] == name and "us" in r), key=lambda r: r["us"])
        lines.append(name)
        for r in [*timed[:best], *(r for r in timed[best:] if r["today"])]:
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
            rows += tune(shape, device, print, options.tiny)
            options.out.write_text(json.dumps({"environment": made_by, "rows": rows}, indent=1))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
