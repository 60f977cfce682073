"""Decode steps, the ordered kernels of one layer and first tokens, in process: one attention backend per run.

`nsa-plugin profile` runs this module once per arm in a fresh process. It loads the model, then measures what each line
of its stdin asks for, BATCH:CONTEXT or the length of a prompt, and does nothing between two lines: other arms may be
measured on the same GPU then. The end of stdin ends it.

Decode steps skip prefill: the latent and index-K caches are filled with random valid rows, so that top-k meets untied
scores and every sequence has its own pages.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from nsa_backend_plugin.layouts import INDEX_DIM, LATENT_DIM, packed_latent_bytes

WARMUP_STEPS, GROUPS, GROUP_STEPS, PROFILED_STEPS = 4, 4, 32, 3
#: Tokens that every sequence of a shape grows by while it is measured.
DECODED_TOKENS = WARMUP_STEPS + GROUPS * GROUP_STEPS + PROFILED_STEPS
FIRST_TOKENS = 5
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


def totals(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """name, launches and us of each kernel in all, the longest first."""
    found: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        row = found.setdefault(kernel["name"], {"name": kernel["name"], "launches": 0, "us": 0.0})
        row["launches"] += 1
        row["us"] = round(row["us"] + kernel["us"], 2)
    return sorted(found.values(), key=lambda row: -row["us"])


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
    check_one_rank(args)
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


def serve(lines: Iterable[str], server_args: list[str], output: Path, kernels: bool) -> None:
    """Load the model once and answer each line with a line of JSON, appended to `output`.

    The first line of `output` says that the model is loaded, and how many tokens its cache holds. lines: BATCH:CONTEXT
    or the length of a prompt, in tokens. kernels: trace them, too. What fails is a row with "error".
    """
    one_batch, model, args = load(server_args)
    runner = model.torch_runner
    fill_caches(runner.token_to_kv_pool)
    model.synchronize()
    _append(output, {"cache_tokens": runner.max_total_num_tokens})
    for line in lines:
        batch_size, colon, context = line.strip().partition(":")
        row: dict[str, Any] = {"batch": int(batch_size), "context": int(context)} if colon else {"prompt": int(line)}
        try:
            if colon:
                row.update(measure_shape(one_batch, model, row["batch"], row["context"], kernels))
            else:
                row.update(first_token(one_batch, model, row["prompt"], args.chunked_prefill_size, kernels))
        except Exception as error:
            row["error"] = repr(error)
        _append(output, row)


def _append(output: Path, row: dict[str, Any]) -> None:
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _check_fits(runner: Any, batch_size: int, tokens: int) -> None:
    """Raises ValueError where `batch_size` sequences of `tokens` tokens do not fit the emptied cache or the model.

    SGLang makes the cache smaller than --max-total-tokens, with no more than a warning, where memory is short.
    """
    free = runner.token_to_kv_pool_allocator.available_size()
    if batch_size * -(-tokens // runner.page_size) * runner.page_size > free:
        raise ValueError(f"{batch_size} x {tokens} tokens: expected at most {free} in pages of {runner.page_size}")
    if tokens > runner.model_config.context_len:
        raise ValueError(f"sequences of {tokens} tokens: expected at most {runner.model_config.context_len}")


def measure_shape(one_batch: Any, model: Any, batch_size: int, context: int, kernels: bool) -> dict[str, Any]:
    """step_us, logits_finite and, with `kernels`, kernels_per_step and the attention part of a layer.

    step_us is the time of a decode step, in us, as a server with SGLang's overlapped scheduler pays it: the host
    prepares and launches a step while the GPU runs the one before, so it is the longer of the two. Nothing in SGLang's
    `decode` waits for the GPU (greedy tokens stay there, allocation looks at lengths on the host); what an attention
    backend waits for, it waits for in a server too. Measured over groups of steps, waiting at the end of a group alone;
    the median of the groups, which are long enough that filling the pipeline once adds at most 3%.
    Raises ValueError for a shape that does not fit the cache.
    """
    runner = model.torch_runner
    model.clear()
    _check_fits(runner, batch_size, context + DECODED_TOKENS)
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
    tokens = torch.randint(3, runner.model_config.vocab_size, (batch_size,), device=runner.device)
    logits = None

    def steps(count: int = 1) -> None:
        nonlocal tokens, logits
        for _ in range(count):
            tokens, logits = model.decode(tokens, batch)
        model.synchronize()

    steps(WARMUP_STEPS)
    times = [_seconds(lambda: steps(GROUP_STEPS)) / GROUP_STEPS for _ in range(GROUPS)]
    row: dict[str, Any] = {"step_us": round(1e6 * statistics.median(times), 1)}
    if kernels:
        trace = trace_kernels(steps)
        row |= {"kernels_per_step": len(trace), "attention": attention_layer(trace)}
    assert logits is not None
    return {**row, "logits_finite": bool(torch.isfinite(logits).all())}


def first_token(one_batch: Any, model: Any, length: int, chunk: int | None, kernels: bool) -> dict[str, Any]:
    """first_token_ms and logits_finite of one request with a prompt of `length` random tokens that no cache has seen.

    With `kernels`, also what the GPU ran for such a prompt: each kernel's name, launches and us, the longest first.

    From the request to its first token on the host, in ms: the prompt is prefilled as a scheduler does it, in chunks of
    `chunk` tokens (none for None or less than 1), each of which attends to those before. Median of FIRST_TOKENS
    prompts, after one that warms up. Tokenizing and HTTP are not in it.
    Raises ValueError for a prompt that does not fit the cache.
    """
    runner = model.torch_runner
    # A scheduler, too, ends all chunks but the last at a page.
    size = max(chunk // runner.page_size, 1) * runner.page_size if chunk and chunk > 0 else length
    logits = None

    def request() -> Any:
        model.clear()
        _check_fits(runner, 1, length)
        prompt = torch.randint(3, runner.model_config.vocab_size, (length,)).tolist()
        [made] = one_batch.prepare_synthetic_inputs_for_latency_test(1, length, [prompt])
        return made

    def prefill(request: Any) -> None:
        nonlocal logits
        for start in range(0, length, size):
            _set_chunk(runner, request, start, min(start + size, length))
            tokens, logits, _ = model.extend([request])
        tokens.tolist()

    times = [_seconds(functools.partial(prefill, request())) for _ in range(1 + FIRST_TOKENS)]
    row: dict[str, Any] = {"first_token_ms": round(1e3 * statistics.median(times[1:]), 2)}
    if kernels:
        row["kernels"] = totals(trace_kernels(lambda: prefill(request())))
    assert logits is not None
    return {**row, "logits_finite": bool(torch.isfinite(logits).all())}


def _set_chunk(runner: Any, request: Any, start: int, end: int) -> None:
    """Make the request's next prefill its tokens [start, end); those before are in the cache."""
    if not hasattr(request, "set_extend_range"):  # SGLang reads the prefix from the request's row
        request.prefix_len, request.extend_end = start, end
        return
    if start:
        holder = request if hasattr(request, "req_pool_idx") else request.kv  # 0.5.19 to 0.5.21
        row = runner.req_to_token_pool.req_to_token[holder.req_pool_idx, :start]
        request.prefix_indices = row.to(request.prefix_indices.dtype)
    request.set_extend_range(start, end)


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--no-kernels", dest="kernels", action="store_false")
    options, server_args = parser.parse_known_args()
    serve(sys.stdin, server_args, options.output, options.kernels)
    # SGLang's distributed teardown can hang a process whose work is done.
    os._exit(0)


if __name__ == "__main__":
    main()
