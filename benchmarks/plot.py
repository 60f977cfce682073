"""Pictures of results: the roofline, and time over batch per backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import BenchmarkResult, ResultsFormatter, describe
from workloads import workload


def save_plot(formatter: ResultsFormatter, results: Sequence[BenchmarkResult], path: str | Path) -> None:
    """Write a PNG: left the roofline of every row with FLOPs, right microseconds over batch, one line per backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 6.5))
    rows = [r for r in results if r.median_us]
    names = list(dict.fromkeys(r.backend for r in rows))
    colors = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    _roofline(left, formatter, rows, colors)
    _over_batch(right, rows, colors)
    figure.suptitle(f"{formatter.config}, {formatter.environment.get('device', '')}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _roofline(axes, formatter: ResultsFormatter, rows: Sequence[BenchmarkResult], colors) -> None:
    for name, color in colors.items():
        mine = [r for r in rows if r.backend == name and r.flops and r.bytes]
        axes.scatter([r.flops / r.bytes for r in mine], [r.tflops for r in mine], s=18, color=color, label=name)
    read, gemm = formatter.ceilings.get("read_gbps"), formatter.ceilings.get("gemm_bf16_tflops")
    intensities = [r.flops / r.bytes for r in rows if r.flops and r.bytes]
    if read and gemm and intensities:
        low, high = min(intensities) / 2, max([*intensities, 1e3 * gemm / read]) * 2
        xs = [low * (high / low) ** (i / 100) for i in range(101)]
        axes.plot(xs, [min(gemm, x * read / 1e3) for x in xs], color="black", linewidth=1)
        axes.set_title(f"roofline: {read:.0f} GB/s read, {gemm:.1f} TFLOP/s bf16")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.legend(fontsize=7)


def _over_batch(axes, rows: Sequence[BenchmarkResult], colors) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for r in rows:
        size = workload(r.workload).batch(r.params)
        fixed = {k: v for k, v in r.params.items() if k not in ("tokens", "batch", "rows")}
        if "batch_spec" in fixed:
            fixed["batch_spec"] = str(fixed["batch_spec"]).lstrip("0123456789")
        case = describe(BenchmarkResult(r.workload, fixed, r.backend))
        lines.setdefault((r.backend, f"{r.workload} {case}"), []).append((size, r.median_us or 0.0))
    styles = {case: ("-", "--", ":", "-.")[i % 4] for i, case in enumerate(dict.fromkeys(c for _, c in lines))}
    for (name, case), points in lines.items():
        points.sort()
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, styles[case], marker=".", color=colors[name], label=f"{name}, {case}")
    axes.set(xscale="log", yscale="log", xlabel="batch (requests, tokens or rows)", ylabel="microseconds")
    if len(lines) <= 24:
        axes.legend(fontsize=6)
