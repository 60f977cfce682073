"""Decode-step latency and the ordered kernels of one layer, in process: one attention backend per run.

`nsa-plugin profile` runs this module once per arm in a fresh process. Prefill is skipped: the latent and index-K
caches are filled with random valid rows, so that top-k meets untied scores and every sequence has its own pages.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nsa_backend_plugin.arms import parse_shapes
from nsa_backend_plugin.layouts import INDEX_DIM, LATENT_DIM, packed_latent_bytes

WARMUP_STEPS, TIMED_STEPS, PROFILED_STEPS = 4, 24, 3
#: The residual norms are the borders: input norm | attention | post-attention norm | MLP | next input norm.
BORDER = re.compile(r"FusedAddRMSNorm|fused_add_rmsnorm|add_rmsnorm", re.IGNORECASE)
ATTENTION = re.compile(r"mla|attend|attention|FlashAttn|flash_fwd|mqa_logits", re.IGNORECASE)
SHORT_US = 3.0


def fill_caches(pool: Any) -> None:
    """Random values in every row of the latent cache and, for DSA pools, of the index-K cache."""
    for buffer in pool.kv_buffer:
        for part in buffer.view(buffer.shape[0], -1).split(1 << 17):
            _fill_latent(part)
    for buffer in getattr(pool, "index_k_with_scale_buffer", ()):
        for part in buffer.split(1 << 13):
            _fill_index(part)


def _fp8_bytes(rows: int, width: int, device: torch.device) -> torch.Tensor:
    values = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def _scale_bytes(rows: int, count: int, device: torch.device) -> torch.Tensor:
    return (torch.rand(rows, count, device=device) * 0.02 + 0.005).view(torch.uint8).view(rows, 4 * count)


def _fill_latent(part: torch.Tensor) -> None:
    rows, width = part.shape
    if part.dtype == torch.bfloat16:
        part.normal_()
        return
    raw = part.view(torch.uint8)
    if width != packed_latent_bytes(LATENT_DIM + 64):
        raw.copy_(_fp8_bytes(rows, width, part.device))
        return
    raw[:, :LATENT_DIM] = _fp8_bytes(rows, LATENT_DIM, part.device)
    raw[:, LATENT_DIM : LATENT_DIM + 16] = _scale_bytes(rows, 4, part.device)
    rope = torch.randn(rows, 64, device=part.device, dtype=torch.bfloat16)
    raw[:, LATENT_DIM + 16 :] = rope.view(torch.uint8).view(rows, 128)


def _fill_index(part: torch.Tensor) -> None:
    tokens = part.shape[1] // (INDEX_DIM + 4)
    part[:, : tokens * INDEX_DIM] = _fp8_bytes(part.shape[0], tokens * INDEX_DIM, part.device)
    part[:, tokens * INDEX_DIM :] = _scale_bytes(part.shape[0], tokens, part.device)


def trace_kernels(step: Any) -> list[dict[str, Any]]:
    """Kernels of the last of PROFILED_STEPS calls of `step`, in start order: name, start_us, us, stream."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = sorted((e for e in trace["traceEvents"] if e.get("cat") in kinds), key=lambda e: e["ts"])
    if not events:
        raise RuntimeError("no GPU kernel in the trace: a layer is profiled on a CUDA or ROCm device only")
    last = events[len(events) // PROFILED_STEPS * (PROFILED_STEPS - 1) :]
    start = last[0]["ts"]
    return [
        {
            "name": e["name"],
            "start_us": round(e["ts"] - start, 2),
            "us": round(e["dur"], 2),
            "stream": e.get("args", {}).get("stream"),
        }
        for e in last
    ]


def attention_layer(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """The median attention part of a layer: from its input norm up to its post-attention norm."""
    borders = [i for i, k in enumerate(kernels) if BORDER.search(k["name"])]
    parts = [kernels[a:b] for a, b in itertools.pairwise(borders)]
    ends = [kernels[b]["start_us"] for b in borders[1:]]
    spans = [
        {"span_us": round(end - part[0]["start_us"], 2), "launches": len(part), "kernels": part}
        for part, end in zip(parts, ends, strict=True)
        if any(ATTENTION.search(k["name"]) for k in part)
    ]
    if not spans:
        raise RuntimeError("no attention kernel between two residual norms: the trace has another structure")
    spans.sort(key=lambda s: s["span_us"])
    layer = spans[len(spans) // 2]
    start = layer["kernels"][0]["start_us"]
    layer["kernels"] = [{**k, "start_us": round(k["start_us"] - start, 2)} for k in layer["kernels"]]
    short = [k["us"] for k in layer["kernels"] if k["us"] < SHORT_US]
    return {**layer, "short_launches": len(short), "short_us": round(sum(short), 1)}


def check_one_rank(args: Any) -> None:
    """Exits when the arguments ask for more than this process, which would wait for the other ranks for ever."""
    for name in ("tp_size", "pp_size"):
        if getattr(args, name) != 1:
            raise SystemExit(f"{name} {getattr(args, name)}: expected 1, a layer is profiled in one process on one GPU")


def load(server_args: list[str]) -> tuple[Any, Any, Any]:
    """(SGLang's one_batch module, its model wrapper with graphs captured, parsed server arguments)."""
    import sglang.benchmark.one_batch as one_batch
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs, prepare_server_args

    load_plugins()
    args = prepare_server_args(server_args)
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    if args.tp_size * args.pp_size != 1:  # the other ranks would never come
        raise SystemExit(
            f"tensor parallel size {args.tp_size}, pipeline parallel size {args.pp_size}: expected 1 and 1"
        )
    one_batch._set_envs_and_config(args)
    _initialize(one_batch, args)
    one_batch.configure_logger(args, prefix="")
    model, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    return one_batch, model, args


def _initialize(one_batch: Any, args: Any) -> None:
    """SGLang's process-wide settings: handed the arguments, or read from those that were published, as of a rank."""
    handed: tuple[Any, ...] = (args,)
    if hasattr(one_batch, "publish"):
        ranks = {}
        if hasattr(one_batch, "SpawnRanks"):
            ranks["ranks"] = one_batch.SpawnRanks(world_rank=0, gpu_id=0)
        one_batch.publish(args, role="scheduler", **ranks)
        handed = ()
    if hasattr(one_batch, "_init_process_global_configs"):
        one_batch._init_process_global_configs()
        return
    for name in ("moe", "fp8_gemm", "fp4_gemm"):
        getattr(one_batch, f"initialize_{name}_config")(*handed)


def measure(shapes: list[tuple[int, int]], server_args: list[str], output: Path) -> None:
    """Load the model once and append one JSON line per (batch, context) to `output`."""
    one_batch, model, _ = load(server_args)
    runner = model.torch_runner
    fill_caches(runner.token_to_kv_pool)
    for batch_size, context in shapes:
        row: dict[str, Any] = {"batch": batch_size, "context": context}
        try:
            row.update(_measure_shape(one_batch, model, runner, batch_size, context))
        except Exception as error:
            row["error"] = repr(error)
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _measure_shape(one_batch: Any, model: Any, runner: Any, batch_size: int, context: int) -> dict[str, Any]:
    model.clear()
    tree = one_batch.TreeCacheNamespace(
        page_size=runner.page_size,
        device=runner.device,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
    )
    batch = one_batch.ScheduleBatch.init_new(
        reqs=one_batch.prepare_synthetic_inputs_for_latency_test(batch_size, context),
        req_to_token_pool=runner.req_to_token_pool,
        token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
        tree_cache=tree,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=one_batch.SpeculativeAlgorithm.NONE,
    )
    batch.prepare_for_extend()
    tokens = torch.randint(3, 1000, (batch_size,), device=runner.device)
    logits = None

    def step() -> None:
        nonlocal tokens, logits
        tokens, logits = model.decode(tokens, batch)
        model.synchronize()

    for _ in range(WARMUP_STEPS):
        step()
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e6)
    kernels = trace_kernels(step)
    assert logits is not None
    return {
        "step_us": round(statistics.median(times), 1),
        "kernels_per_step": len(kernels),
        "logits_finite": bool(torch.isfinite(logits).all()),
        "attention": attention_layer(kernels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", required=True, help="BATCH:CONTEXT")
    parser.add_argument("--output", type=Path, required=True)
    options, server_args = parser.parse_known_args()
    measure(parse_shapes(options.shapes), server_args, options.output)
    # SGLang's distributed teardown can hang a process whose work is done.
    os._exit(0)


if __name__ == "__main__":
    main()
