"""The clock's logic. No test depends on how fast the machine is."""

from __future__ import annotations

import pytest
import torch

from benchmarks.timing import clock

CPU = torch.device("cpu")


def test_summary() -> None:
    timing = clock.summarize([10.0, 12.0, 11.0, 100.0, 9.0], 7, "graph")
    assert timing.median_us == 11.0
    assert (timing.min_us, timing.max_us, timing.samples, timing.calls_per_sample) == (9.0, 100.0, 5, 7)
    assert timing.spread == pytest.approx((12.0 - 10.0) / 11.0)
    assert clock.summarize([3.0], 1, "wall").spread == 0.0
    with pytest.raises(ValueError, match="samples"):
        clock.summarize([], 1, "wall")


def test_inputs_are_taken_in_turn() -> None:
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    timing = clock.time_calls(calls, CPU, repeats=4, warmup_iters=2)
    assert timing.method == "wall"
    assert timing.samples == 4
    assert seen == [i % 3 for i in range(len(seen))]
    assert len(seen) >= 6


def test_warm_up_waits_for_two_equal_samples() -> None:
    samples = iter([100.0, 50.0, 20.0, 10.0, 10.1, 10.0])
    assert clock.warm_up(lambda: next(samples), minimum=2, budget_s=60.0) == 5


def test_warm_up_takes_the_minimum_and_gives_up() -> None:
    assert clock.warm_up(lambda: 1.0, minimum=4, budget_s=60.0) == 4
    rising = iter(range(1, 1000))
    assert clock.warm_up(lambda: 2.0 ** next(rising), minimum=1, budget_s=60.0) == clock.MAX_WARMUP_SAMPLES


def test_slow_calls_get_fewer_samples() -> None:
    ticks = iter(range(100))
    assert len(clock._take(lambda: float(next(ticks)), repeats=50, budget_s=-1.0)) == 3


@pytest.mark.parametrize(
    ("inputs", "estimate_us", "budget_us", "expected"),
    [
        (64, 100.0, 1e6, 64),  # every input once
        (2, 1.0, 1e6, clock.MAX_GRAPH_CALLS),  # a tiny kernel: many calls hide the launch
        (2, 20.0, 1e6, 50),  # a millisecond's worth
        (64, 1e5, 1e5, 4),  # too slow for every input
        (1, 1e7, 1e5, 2),
    ],
)
def test_calls_in_graph(inputs: int, estimate_us: float, budget_us: float, expected: int) -> None:
    assert clock.calls_in_graph(inputs, estimate_us, budget_us) == expected


def test_a_graph_grows_until_its_launch_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 2 us kernel whose launch from Python takes 60 us: the first graph is too short to measure it."""

    class Graph:
        def __init__(self, count: int):
            self.us = 10.0 + 2.0 * count
            self.replay = lambda: self.us

    captured: list[int] = []
    monkeypatch.setattr(clock, "_captured", lambda calls, count: captured.append(count) or Graph(count))
    monkeypatch.setattr(clock, "_event_us", lambda call: call())
    timing = clock._time_graph([lambda: None] * 3, 60.0, repeats=5, warmup_iters=2, budget_s=0.3)
    assert captured == [17, 387]
    assert timing.calls_per_sample == 387
    assert timing.median_us == pytest.approx(2.0, rel=0.02)
    captured.clear()
    clock._time_graph([lambda: None] * 3, 2.1, repeats=5, warmup_iters=2, budget_s=0.3)
    assert captured == [400]


@pytest.mark.parametrize("arguments", [{"calls": []}, {"calls": [lambda: None], "repeats": 0}])
def test_bad_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError):
        clock.time_calls(arguments.pop("calls"), CPU, **arguments)


def test_ceilings_on_a_cpu() -> None:
    ceilings = clock.measure_ceilings(CPU)
    assert min(ceilings.read_gbps, ceilings.copy_gbps, ceilings.gemm_bf16_tflops, ceilings.launch_us) > 0


@pytest.mark.gpu
def test_graph_clock_on_a_gpu() -> None:
    device = torch.device("cuda", 0)
    inputs = [torch.randn(1 << 20, device=device) for _ in range(3)]
    timing = clock.time_calls([lambda x=x: x.mul_(1.0) for x in inputs], device)
    assert timing.method == "graph"
    assert timing.median_us > 0


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_with_events() -> None:
    device = torch.device("cuda", 0)
    value = torch.ones(4, device=device)
    assert clock.time_calls([lambda: value.sum().item()], device).method == "events"
    assert clock.time_calls([lambda: value.add_(1)], device).method == "graph"  # a failed capture leaves no trace
