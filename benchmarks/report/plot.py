"""Pictures of results: a panel per kind of case, lines over the axis that the configuration's question is about."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.backends import DEFAULT, is_peer
from benchmarks.common import BenchmarkResult, ResultsFormatter, write
from benchmarks.report.crossover import crossovers
from benchmarks.report.tables import spread_out
from benchmarks.schema import Picture
from benchmarks.workloads import workload

#: Panels of one picture; the ones with most points are kept.
MAX_PANELS = 28
_COLUMNS = 4
_MARKERS = "osD^vP*X<>hdp8H"
#: Parameters that make a good horizontal axis, best first.
_AXES = ("tokens", "batch", "rows", "q_len", "context", "batch_spec")
_TARGET = "target"

Params = dict[str, Any]


@dataclass
class Panel:
    """lines: label -> value on the axis -> microseconds or GB/s. peers: labels whose kernels live elsewhere."""

    title: str
    axis: str
    values: list[Any]
    lines: dict[str, dict[Any, float]] = field(default_factory=dict)
    peers: set[str] = field(default_factory=set)
    crossover: int | None = None

    @property
    def points(self) -> int:
        return sum(map(len, self.lines.values()))


def panels(rows: Sequence[BenchmarkResult], picture: Picture, unit: str = "us") -> list[Panel]:
    """The panels of rows that have a time, each workload over an axis of its own where it lacks the picture's."""
    found: list[Panel] = []
    for name in dict.fromkeys(r.workload for r in rows):
        pairs = _with_parameters([r for r in rows if r.workload == name], picture)
        keys = dict.fromkeys(k for _, p in pairs for k in p)
        varying = [k for k in keys if len({str(p.get(k)) for _, p in pairs}) > 1]
        lines = [k for k in picture.lines if k in varying]
        axis = picture.x if picture.x in varying else next((a for a in (*_AXES, *varying) if a in varying), "")
        apart = [k for k in varying if k != axis and k not in lines]
        mine = _panels(name, pairs, axis, apart, lines, unit)
        if len(mine) > 1 and all(len(panel.values) == 1 for panel in mine):  # nothing to follow: cases side by side
            for _, p in pairs:
                p["case"] = " ".join(f"{k}={p[k]}" for k in (*apart, axis) if k in p)
            mine = _panels(name, pairs, "case", [], lines, unit)
        found += mine
    return found


def _panels(
    name: str,
    pairs: Sequence[tuple[BenchmarkResult, Params]],
    axis: str,
    apart: Sequence[str],
    lines: Sequence[str],
    unit: str,
) -> list[Panel]:
    """A panel per combination of the parameters `apart`, in it a line per backend and parameters `lines`."""
    found: dict[str, Panel] = {}
    members: dict[str, list[BenchmarkResult]] = {}
    for r, p in pairs:
        title = f"{name} " + " ".join(f"{k}={p[k]}" for k in apart if k in p)
        panel = found.setdefault(title, Panel(title, axis, []))
        members.setdefault(title, []).append(r)
        value = p.get(axis, "")
        panel.values += [value] if value not in panel.values else []
        label = " ".join([r.backend, *(f"{k}={p[k]}" for k in lines)])
        panel.lines.setdefault(label, {})[value] = (r.gbps if unit == "GB/s" else r.median_us) or 0.0
        panel.peers |= {label} if is_peer(r.backend, name) else set()
        if r.target_us is not None and unit == "us":
            panel.lines.setdefault(_TARGET, {})[value] = r.target_us
    for title, panel in found.items():
        lengths = [q for sizes in crossovers(members[title]).values() for q in sizes.values()]
        panel.crossover = lengths[0] if axis == "q_len" and len(lengths) == 1 else None
        if all(isinstance(v, (int, float)) for v in panel.values):
            panel.values.sort()
    return list(found.values())


def _with_parameters(rows: Sequence[BenchmarkResult], picture: Picture) -> list[tuple[BenchmarkResult, Params]]:
    """Rows of one workload that the picture shows; their batches as batch, q_len and context where all can be."""
    hidden = ("pool_slots", "pool_pages", "min_sets")
    plain = [workload(r.workload).complete(r.params) for r in rows]
    apart = [spread_out(p) for p in plain]
    chosen = plain if any("batch_spec" in p for p in apart) else apart
    pairs = [(r, {k: v for k, v in p.items() if k not in hidden}) for r, p in zip(rows, chosen, strict=True)]
    return [(r, p) for r, p in pairs if all(p.get(k) in _list(v) for k, v in picture.where.items())]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def save_plot(
    formatter: ResultsFormatter,
    results: Sequence[BenchmarkResult],
    path: str | Path,
    picture: Picture | None = None,
    unit: str = "us",
    force: bool = False,
) -> None:
    """Write a PNG: the panels, and the roofline where the rows have FLOPs. Ours are solid, peers dashed and hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results if r.median_us]
    found = panels(rows, picture or Picture(), unit)
    kept = sorted(found, key=lambda panel: -panel.points)[:MAX_PANELS]
    shown = [panel for panel in found if panel in kept]
    labels = list(dict.fromkeys(label for panel in shown for label in panel.lines if label != _TARGET))
    peers = set().union(*(panel.peers for panel in shown)) if shown else set()
    styles = {label: _style(i, label in peers, pyplot) for i, label in enumerate(labels)}
    styles[DEFAULT] = {
        "color": "black",
        "marker": "x",
        "markersize": 5,
        "linestyle": ":",
        "linewidth": 1.6,
        "zorder": 3,
    }
    styles[_TARGET] = {"color": "black", "marker": "_", "markersize": 14, "linestyle": "none"}
    with_flops = all(r.flops and r.bytes for r in rows) and bool(rows)
    count = len(shown) + with_flops
    columns = min(_COLUMNS, max(1, count))
    grid = (math.ceil(max(1, count) / columns), columns)
    figure, axes = pyplot.subplots(
        *grid, figsize=(0.6 + 4.4 * columns, 1.4 + 3.2 * grid[0]), layout="constrained", squeeze=False
    )
    places = list(axes.flat)
    for place in places[count:]:
        place.set_axis_off()
    for place, panel in zip(places, shown, strict=False):
        _draw(place, panel, styles, unit)
    if with_flops:
        _roofline(places[len(shown)], formatter, rows, pyplot)
    drawn = [label for label in styles if any(label in panel.lines for panel in shown)]
    handles = [pyplot.Line2D([], [], **styles[label], label=label) for label in drawn]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(2 * columns, len(handles)), fontsize=9)
    about = f"{formatter.config}, {formatter.environment.get('device', '')}: {unit} (ours solid, peers dashed)"
    if picture and picture.where:
        about += ", " + ", ".join(f"{k} {', '.join(map(str, _list(v)))}" for k, v in picture.where.items())
    about += f"; {len(found) - len(shown)} smaller panels are not drawn" if len(found) > len(shown) else ""
    figure.suptitle("\n".join(textwrap.wrap(about, 46 * columns)), fontsize=11)
    _save(figure, path, force)
    pyplot.close(figure)


def _save(figure: Any, path: str | Path, force: bool) -> None:
    """A palette is enough for lines on white, and makes half the file."""
    from PIL import Image

    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, dpi=90, format="png")
    Image.open(whole).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(small, format="PNG", optimize=True)
    write(path, small.getvalue(), force)


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


def _draw(axes: Any, panel: Panel, styles: dict[str, Any], unit: str) -> None:
    """Lines over the values of the axis, equally spaced."""
    place = {value: i for i, value in enumerate(panel.values)}
    for label, points in panel.lines.items():
        ordered = sorted(points, key=place.__getitem__)
        axes.plot([place[v] for v in ordered], [points[v] for v in ordered], **styles[label])
    texts = [str(value) for value in panel.values]
    turn = {"rotation": 25, "ha": "right"} if max(map(len, texts)) > 9 else {}
    axes.set_xticks(range(len(texts)), texts, fontsize=8, **turn)
    axes.set_yscale("log")
    _round_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title("\n".join(textwrap.wrap(panel.title, 52)), fontsize=9)
    axes.set_ylabel(unit, fontsize=8)
    axes.set_xlabel(panel.axis, fontsize=8)
    if panel.crossover is not None:
        x = place[panel.crossover]
        axes.axvline(x, color="black", linestyle=":", linewidth=1)
        where = (x, axes.get_ylim()[0])
        axes.annotate(f"prefill wins from {panel.crossover} ", where, fontsize=8, va="bottom", ha="right")


def _roofline(axes: Any, formatter: ResultsFormatter, rows: Sequence[BenchmarkResult], pyplot: Any) -> None:
    """TFLOP/s over FLOP per byte, under the machine's ceilings."""
    read, gemm = formatter.ceilings.get("read_gbps"), formatter.ceilings.get("gemm_bf16_tflops")
    axes.set(xscale="log", yscale="log", title="roofline")
    axes.set_xlabel("FLOP per byte", fontsize=8)
    axes.set_ylabel("TFLOP/s", fontsize=8)
    axes.tick_params(labelsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        _round_ticks(axis)
    own = [r for r in rows if not is_peer(r.backend, r.workload)]
    for drawn, face, edge in ((rows, "none", "tab:gray"), (own, "tab:blue", "tab:blue")):
        points = [(r.flops / r.bytes, r.flops / (r.median_us or 1.0) / 1e6) for r in drawn]
        axes.scatter(*zip(*points, strict=True), s=12, facecolors=face, edgecolors=edge) if points else None
    title = "roofline: ours blue, peers hollow"
    if read and gemm:
        intensities = [r.flops / r.bytes for r in rows]
        low, high = min(intensities) / 2, max([*intensities, 1e3 * gemm / read]) * 2
        xs = [low * (high / low) ** (i / 100) for i in range(101)]
        axes.plot(xs, [min(gemm, x * read / 1e3) for x in xs], color="black", linewidth=1)
        title += f"\n{read:.0f} GB/s read, {gemm:.1f} TFLOP/s bf16"
    axes.set_title(title, fontsize=9)


def _round_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... as plain numbers on a logarithmic axis."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())
