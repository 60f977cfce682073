"""The clock: cold inputs, warm-up until stable, medians with spread, and the machine's ceilings.

On a GPU a sample is one replay of a CUDA graph that holds many calls, each on its own inputs, so that a call finds
its data in DRAM and not in L2 (unless all its input sets together fit there, see `input_sets`), and Python's launch
overhead is not measured. A function that cannot be captured is
timed call by call with events, the L2 cache flushed before each call. On a CPU a sample is one call on a wall clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

Call = Callable[[], object]

#: A graph shorter than this would measure its own launch.
MIN_GRAPH_US = 1000.0
MAX_GRAPH_CALLS = 400
#: Warm-up ends when two successive samples differ by less than this.
STABLE = 0.02
MAX_WARMUP_SAMPLES = 20


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call. spread: interquartile range over the median. method: graph, events or wall."""

    median_us: float
    mean_us: float
    std_us: float
    min_us: float
    max_us: float
    spread: float
    samples: int
    calls_per_sample: int
    method: str

    def as_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def summarize(samples: Sequence[float], calls_per_sample: int, method: str) -> Timing:
    """Timing of samples in microseconds per call."""
    if not samples:
        raise ValueError("samples=[]: expected at least one sample")
    median = statistics.median(samples)
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    else:
        low = high = median
    return Timing(
        median_us=median,
        mean_us=statistics.fmean(samples),
        std_us=statistics.stdev(samples) if len(samples) > 1 else 0.0,
        min_us=min(samples),
        max_us=max(samples),
        spread=(high - low) / median if median else 0.0,
        samples=len(samples),
        calls_per_sample=calls_per_sample,
        method=method,
    )


def warm_up(sample: Callable[[], float], minimum: int, budget_s: float) -> int:
    """Take samples until two successive ones agree to within STABLE; returns how many were taken."""
    started = time.perf_counter()
    previous = sample()
    taken = 1
    while taken < max(minimum, MAX_WARMUP_SAMPLES):
        current = sample()
        taken += 1
        stable = abs(current - previous) <= STABLE * max(current, previous)
        if taken >= minimum and (stable or time.perf_counter() - started > budget_s):
            break
        previous = current
    return taken


def time_calls(
    calls: Sequence[Call],
    device: torch.device,
    *,
    repeats: int = 9,
    warmup_iters: int = 3,
    budget_s: float = 0.6,
) -> Timing:
    """Median time of one call. `calls` do the same work on different inputs and are taken in turn.

    repeats: samples. warmup_iters: least number of warm-up samples; more are taken until stable.
    budget_s: about how long the samples may take together; slow calls get fewer samples, never fewer than three.
    """
    if not calls:
        raise ValueError("calls=[]: expected at least one call")
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r}: expected at least 1")
    if device.type != "cuda":
        return _time_wall(calls, repeats, warmup_iters, budget_s)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles and tunes outside the capture
            call()
        estimate_us = _event_us(calls[0])
        try:
            return _time_graph(calls, estimate_us, repeats, warmup_iters, budget_s)
        except (RuntimeError, ValueError) as error:  # ValueError: an implementation that declines during a capture
            torch.cuda.synchronize(device)
            if "captur" not in str(error).lower():
                raise
            return _time_events(calls, estimate_us, repeats, warmup_iters, budget_s, device)


def _time_wall(calls: Sequence[Call], repeats: int, warmup_iters: int, budget_s: float) -> Timing:
    position = 0

    def sample() -> float:
        nonlocal position
        call = calls[position % len(calls)]
        position += 1
        started = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - started) / 1e3

    warm_up(sample, max(warmup_iters, 1), budget_s)
    return summarize(_take(sample, repeats, budget_s), 1, "wall")


def _time_graph(calls: Sequence[Call], estimate_us: float, repeats: int, warmup_iters: int, budget_s: float) -> Timing:
    sample_budget_us = budget_s * 1e6 / repeats
    count = calls_in_graph(len(calls), estimate_us, sample_budget_us)
    graph = _captured(calls, count)
    graph.replay()
    # The estimate of a small kernel is its launch from Python; only a replay tells how long the kernel takes.
    longer = calls_in_graph(len(calls), _event_us(graph.replay) / count, sample_budget_us)
    if longer > 2 * count:
        count, graph = longer, _captured(calls, longer)

    def sample() -> float:
        return _event_us(graph.replay) / count

    warm_up(sample, max(warmup_iters, 1), budget_s)
    return summarize(_take(sample, repeats, budget_s), count, "graph")


def _captured(calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(count):
            calls[i % len(calls)]()
    return graph


def calls_in_graph(inputs: int, estimate_us: float, sample_budget_us: float) -> int:
    """How many calls one graph holds: every input once, enough to hide the graph's launch, within the budget."""
    wanted = max(inputs, min(MAX_GRAPH_CALLS, math.ceil(MIN_GRAPH_US / max(estimate_us, 0.1))))
    affordable = int(sample_budget_us / max(estimate_us, 0.1))
    return max(2, min(wanted, max(affordable, min(inputs, 4))))


def _time_events(
    calls: Sequence[Call],
    estimate_us: float,
    repeats: int,
    warmup_iters: int,
    budget_s: float,
    device: torch.device,
) -> Timing:
    cache = torch.empty(4 * l2_bytes(device), dtype=torch.uint8, device=device)
    count = max(1, min(20, int(budget_s * 1e6 / repeats / max(estimate_us, 1.0))))
    position = 0

    def sample() -> float:
        nonlocal position
        times = []
        for _ in range(count):
            cache.zero_()  # also keeps the GPU busy while Python prepares the launch
            times.append(_event_us(calls[position % len(calls)]))
            position += 1
        return statistics.median(times)

    warm_up(sample, max(warmup_iters, 1), budget_s)
    return summarize(_take(sample, repeats, budget_s), count, "events")


def _take(sample: Callable[[], float], repeats: int, budget_s: float) -> list[float]:
    started = time.perf_counter()
    samples = []
    for i in range(repeats):
        if i >= 3 and time.perf_counter() - started > 2 * budget_s:
            break
        samples.append(sample())
    return samples


def _event_us(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def l2_bytes(device: torch.device) -> int:
    """Bytes of the last cache before DRAM; 0 on a CPU, where a call is too slow for the difference to matter."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def input_sets(bytes_per_call: int, bytes_per_set: int, device: torch.device, at_least: int = 2, cap: int = 64) -> int:
    """How many input sets make every call find cold data: three L2 caches' worth, within a quarter of free memory.

    `cap` sets of less than an L2 cache together stay in it: calls that touch so little are measured warm.
    bytes_per_call: what one call touches. bytes_per_set: memory that one more set allocates.
    """
    if device.type != "cuda":
        return at_least
    wanted = math.ceil(3 * l2_bytes(device) / max(bytes_per_call, 1))
    affordable = int(torch.cuda.mem_get_info(device)[0] / 4 / max(bytes_per_set, 1))
    return max(at_least, min(wanted, cap, affordable))


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches in this run: plain reads, a copy (bytes both ways), a GEMM, one empty kernel."""

    read_gbps: float
    copy_gbps: float
    gemm_bf16_tflops: float
    launch_us: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure the ceilings, twice, and keep the best: right after heavy work the clocks are lower for a moment.

    A CPU gets small tensors.
    """
    quick = device.type != "cuda"
    count = 1 << (22 if quick else 29)
    source = torch.ones(count, dtype=torch.int32, device=device)
    floats, target = source.view(torch.float32), torch.empty(count, device=device)
    size = 256 if quick else 8192
    a = torch.randn(size, size, device=device).to(torch.bfloat16)
    b = torch.randn(size, size, device=device).to(torch.bfloat16)
    one = torch.zeros(1, device=device)
    works: tuple[Call, ...] = (
        lambda: torch.amax(source),
        lambda: torch.mul(floats, 1.0, out=target),  # a kernel; a plain copy_ goes to the driver, which is slower
        lambda: a @ b,
        lambda: one.add_(1),
    )
    passes = [[time_calls([work], device).median_us for work in works] for _ in range(2)]
    read, copy, gemm, launch = (min(times) for times in zip(*passes, strict=True))
    return Ceilings(
        read_gbps=4 * count / read / 1e3,
        copy_gbps=8 * count / copy / 1e3,
        gemm_bf16_tflops=2 * size**3 / gemm / 1e6,
        launch_us=launch,
    )
