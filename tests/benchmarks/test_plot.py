"""Pictures: each answers its configuration's question. What goes into which panel, and that a PNG is written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import cli as benchmark
from benchmarks import schema
from benchmarks.common import BenchmarkResult, ResultsFormatter, add_comparisons, load_json
from benchmarks.report import plot
from benchmarks.schema import Picture

from .conftest import SUITE

FILES = sorted((SUITE / "results").glob("*.json"))


def dense(spec: str, backend: str, us: float, **params) -> BenchmarkResult:
    known = {"batch_spec": spec, "heads": 16, "page_size": 64, **params}
    return BenchmarkResult("dense_decode", known, backend, median_us=us, bytes=1000, flops=5000, tflops=1.0)


def shown(path: Path) -> list[plot.Panel]:
    formatter, rows = load_json(path)
    config = schema.load(SUITE / "configs" / f"{formatter.config}.yaml")
    add_comparisons(rows, formatter.ceilings["read_gbps"])
    return plot.panels([r for r in rows if r.median_us], config.plot, config.unit)


def test_a_panel_per_kind_of_case() -> None:
    rows = [dense(f"{b}q1s{s}k", name, b * s) for b in (1, 8) for s in (1, 4) for name in ("triton", "fa3_planned")]
    found = plot.panels(rows, Picture())
    assert [panel.title for panel in found] == ["dense_decode context=1024", "dense_decode context=4096"]
    for panel in found:
        assert (panel.axis, panel.values) == ("batch", [1, 8])
        assert list(panel.lines) == ["triton", "fa3_planned"]
        assert panel.peers == {"fa3_planned"}


def test_a_sweep_is_one_panel_over_its_values() -> None:
    rows = [dense("64q1s1k", name, 5.0 / n, num_kv_splits=n) for n in (1, 16, 4) for name in ("triton", "torch")]
    words = ["--batch-specs", "64q1s1k", "--sweep-param", "num_kv_splits", "--sweep-values", "1", "16", "4"]
    config = benchmark.configuration(benchmark.build_parser().parse_args(words))
    [panel] = plot.panels(rows, config.plot)
    assert (panel.axis, panel.values) == ("num_kv_splits", [1, 4, 16])
    assert panel.lines["triton"] == {1: 5.0, 4: 1.25, 16: 0.3125}


def test_cases_without_an_axis_stand_side_by_side() -> None:
    rows = [BenchmarkResult("topk", {"rows": r, "context": c}, "triton", median_us=1.0) for r, c in ((1, 10), (2, 20))]
    [panel] = plot.panels(rows, Picture())
    assert panel.values == ["context=10 rows=1", "context=20 rows=2"]


def test_the_crossover_question_is_answered_over_query_length() -> None:
    """Both pipelines in one panel per batch size, and the length from which prefill wins."""
    found = shown(SUITE / "results" / "reorder_threshold-h200.json")
    assert [panel.title for panel in found] == [f"mla_batch batch={2**i}" for i in range(9)]
    for panel in found:
        assert panel.axis == "q_len"
        assert panel.values == [2**i for i in range(11)]
        decode, prefill = panel.lines["default pipeline=decode"], panel.lines["default pipeline=prefill"]
        first = panel.values.index(panel.crossover)
        assert all((prefill[q] <= decode[q]) == (q >= panel.crossover) for q in panel.values[first - 1 :])


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("cutlass_mla", "context"),
        ("dsa_decode", "tokens"),
        ("mla_concat", "tokens"),
        ("mla_decode", "batch"),
        ("mla_mixed_batch", "batch_spec"),
        ("small_heads", "heads"),
        ("speculative_decode", "q_len"),
        ("standard_attention", "batch_spec"),
    ],
)
def test_the_axis_of_a_configuration_is_what_it_asks_about(name: str, axis: str) -> None:
    assert {panel.axis for panel in shown(SUITE / "results" / f"{name}-h200.json")} == {axis}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_picture_is_made_of_single_points(path: Path) -> None:
    found = shown(path)
    assert sum(len(panel.values) == 1 for panel in found) <= len(found) / 10
    assert len(found) <= plot.MAX_PANELS


def test_every_title_fits_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles are drawn inside the picture and do not reach into each other. Of some results in each run."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(plot, "_save", lambda figure, *rest: figures.append(figure))
    for path in random.sample(FILES, 4):
        formatter, rows = load_json(path)
        config = schema.load(SUITE / "configs" / f"{formatter.config}.yaml")
        plot.save_plot(formatter, rows, tmp_path / "x.png", config.plot, config.unit)
        figure = figures.pop()
        figure.draw_without_rendering()
        whole = figure.bbox
        boxes = [a.title.get_window_extent() for a in figure.axes if a.title.get_text()]
        for box in [*boxes, figure._suptitle.get_window_extent()]:
            assert box.x0 >= whole.x0, path.stem
            assert box.x1 <= whole.x1, path.stem
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]), path.stem


@pytest.mark.parametrize("count", [1, 40])
def test_any_number_of_panels_is_drawn(count: int, tmp_path: Path) -> None:
    rows = [dense(f"{b}q1s{s}", "triton", 1.0 * s) for b in (1, 2) for s in range(1, count + 1)]
    formatter = ResultsFormatter({"device": "x"}, {"read_gbps": 4000.0, "gemm_bf16_tflops": 800.0}, "many")
    plot.save_plot(formatter, rows, tmp_path / "many.png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_draws(tmp_path: Path) -> None:
    """mla_concat has no FLOPs, so the roofline must cope with having nothing to draw."""
    for config in ("mla_concat", "mla_decode"):
        path = tmp_path / f"{config}.png"
        words = [
            "--config",
            str(SUITE / "configs" / f"{config}.yaml"),
            "--quick",
            "--device",
            "cpu",
            "--backend",
            "torch",
        ]
        words += ["--repeats", "1", "--plot", str(path), "--output-json", str(tmp_path / f"{config}.json")]
        assert benchmark.main(words) == 0
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = benchmark.importlib.util.find_spec
    monkeypatch.setattr(
        benchmark.importlib.util, "find_spec", lambda name, *_: None if name == "matplotlib" else find(name)
    )
    assert benchmark.main(["--batch-specs", "q1s8", "--plot", "x.png"]) == 2
    assert "matplotlib" in capsys.readouterr().err
