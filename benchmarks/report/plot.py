"""Pictures of results: the roofline of every row, and time over batch per backend, a panel per kind of case."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.backends import is_peer
from benchmarks.common import BenchmarkResult, ResultsFormatter, describe, write
from benchmarks.workloads import workload

#: Panels of one picture, the ones with most points first to be kept.
MAX_PANELS = 12
_COLUMNS = 3
_MARKERS = "osD^vP*X<>hdp8H"

#: Panel title -> backend -> (batch, microseconds)
Panels = dict[str, dict[str, list[tuple[int, float]]]]


def save_plot(
    formatter: ResultsFormatter, results: Sequence[BenchmarkResult], path: str | Path, force: bool = False
) -> None:
    """Write a PNG. Left: TFLOP/s over FLOP per byte under the machine's ceilings, for rows with FLOPs. Right:
    microseconds over batch. Ours are solid, peers dashed and hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results if r.median_us]
    names = list(dict.fromkeys(r.backend for r in rows))
    peers = {r.backend for r in rows if is_peer(r.backend, r.workload)}
    styles = {name: _style(i, name in peers, pyplot) for i, name in enumerate(names)}
    found = panels(rows)
    shown = sorted(sorted(found, key=lambda t: -_points(found[t]))[:MAX_PANELS], key=list(found).index)
    grid_rows = max(2, math.ceil(len(shown) / _COLUMNS))
    figure = pyplot.figure(figsize=(19, 1.2 + 3.1 * grid_rows), layout="constrained")
    grid = figure.add_gridspec(grid_rows, _COLUMNS + 1, width_ratios=[1.5] + [1] * _COLUMNS)
    _roofline(figure.add_subplot(grid[:2, 0]), formatter, rows, styles)
    for i, title in enumerate(shown):
        _panel(figure.add_subplot(grid[i // _COLUMNS, 1 + i % _COLUMNS]), title, found[title], styles)
    handles = [pyplot.Line2D([], [], **styles[n], label=n) for n in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, max(1, len(names))), fontsize=9)
    omitted = f" ({len(found) - len(shown)} more kinds of cases not drawn)" if len(shown) < len(found) else ""
    figure.suptitle(f"{formatter.config}, {formatter.environment.get('device', '')}{omitted}")
    _save(figure, path, force)
    pyplot.close(figure)


def _save(figure: Any, path: str | Path, force: bool) -> None:
    """A palette is enough for lines on white, and makes half the file."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=90, format="png")
    small = io.BytesIO()
    Image.open(whole).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(small, format="PNG", optimize=True)
    write(path, small.getvalue(), force)


def panels(rows: Sequence[BenchmarkResult]) -> Panels:
    """Rows by what they have in common besides batch and backend. Kinds of a single batch are left out, unless there
    is no other."""
    found: Panels = {}
    for r in rows:
        fixed = {k: v for k, v in r.params.items() if k not in ("tokens", "batch", "rows")}
        if "batch_spec" in fixed:
            fixed["batch_spec"] = str(fixed["batch_spec"]).lstrip("0123456789")
        title = f"{r.workload} {describe(BenchmarkResult(r.workload, fixed, r.backend))}"
        point = (workload(r.workload).batch(r.params), r.median_us or 0.0)
        found.setdefault(title, {}).setdefault(r.backend, []).append(point)
    lines = {t: panel for t, panel in found.items() if any(len(points) > 1 for points in panel.values())}
    return lines or found


def _points(panel: dict[str, list[tuple[int, float]]]) -> int:
    return sum(len(points) for points in panel.values())


def _style(i: int, peer: bool, pyplot: Any) -> dict[str, Any]:
    color = pyplot.get_cmap("tab10")(i % 10)
    return {
        "color": color,
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 5,
        "markerfacecolor": "none" if peer else color,
        "linestyle": "--" if peer else "-",
        "linewidth": 1.0 if peer else 1.6,
    }


def _roofline(axes: Any, formatter: ResultsFormatter, rows: Sequence[BenchmarkResult], styles: dict) -> None:
    read, gemm = formatter.ceilings.get("read_gbps"), formatter.ceilings.get("gemm_bf16_tflops")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title="roofline")
    _round_ticks(axes.xaxis)
    _round_ticks(axes.yaxis)
    drawn = [r for r in rows if r.flops and r.bytes and r.tflops]
    if not drawn:
        axes.text(0.5, 0.5, "these operations have no FLOPs", ha="center", transform=axes.transAxes)
        return
    for name, style in styles.items():
        mine = [r for r in drawn if r.backend == name]
        axes.plot([r.flops / r.bytes for r in mine], [r.tflops for r in mine], **{**style, "linestyle": "none"})
    if read and gemm:
        intensities = [r.flops / r.bytes for r in drawn]
        low, high = min(intensities) / 2, max([*intensities, 1e3 * gemm / read]) * 2
        xs = [low * (high / low) ** (i / 100) for i in range(101)]
        axes.plot(xs, [min(gemm, x * read / 1e3) for x in xs], color="black", linewidth=1)
        axes.set_title(f"roofline: {read:.0f} GB/s read, {gemm:.1f} TFLOP/s bf16")


def _round_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... as plain numbers on a logarithmic axis."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _panel(axes: Any, title: str, lines: dict[str, list[tuple[int, float]]], styles: dict) -> None:
    for name, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, **styles[name])
    sizes = sorted({x for points in lines.values() for x, _ in points})
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [str(s) for s in sizes], fontsize=8)
    axes.minorticks_off()
    _round_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(title, fontsize=8)
    axes.set_ylabel("us", fontsize=8)
    axes.set_xlabel("batch (requests, tokens or rows)", fontsize=8)
