"""Pictures: what goes into which panel, and that the command line writes a PNG."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cli as benchmark
from benchmarks.common import BenchmarkResult, ResultsFormatter
from benchmarks.report import plot

from .conftest import SUITE


def dense(spec: str, backend: str, us: float) -> BenchmarkResult:
    params = {"batch_spec": spec, "heads": 16, "page_size": 64}
    return BenchmarkResult("dense_decode", params, backend, median_us=us, bytes=1000, flops=5000, tflops=1.0)


def test_a_panel_per_kind_of_case() -> None:
    rows = [dense(f"{b}q1s{s}k", name, b * s) for b in (1, 8) for s in (1, 4) for name in ("triton", "fa3_planned")]
    rows.append(dense("4q1s32k", "triton", 7.0))  # a single batch size makes no line
    found = plot.panels(rows)
    assert sorted(found) == [f"dense_decode batch_spec=q1s{s}k heads=16 page_size=64" for s in (1, 4)]
    for panel in found.values():
        assert list(panel) == ["triton", "fa3_planned"]
        assert [batch for batch, _ in panel["triton"]] == [1, 8]
    assert len(plot.panels(rows[-1:])) == 1  # unless there is nothing else


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
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name, *_: name != "matplotlib" and find(name))
    assert benchmark.main(["--batch-specs", "q1s8", "--plot", "x.png"]) == 2
    assert "matplotlib" in capsys.readouterr().err
