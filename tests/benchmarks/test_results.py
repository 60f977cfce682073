"""Results: comparisons, verdicts, tables, files, report, crossover."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import backends
from benchmarks import schema as configs
from benchmarks.common import BenchmarkResult, ResultsFormatter, add_comparisons, load_json
from benchmarks.report import compare, peer_baseline
from benchmarks.report import page as report
from benchmarks.report import tables as report_tables
from benchmarks.report.crossover import crossovers, tables

from .conftest import SUITE

ENVIRONMENT = {name: name for name in ("device", "driver", "commit", "sources", "date", "command")}


def row(backend: str, us: float | None, **values) -> BenchmarkResult:
    params = values.pop("params", {"tokens": 8, "heads": 16, "kv": "packed"})
    status = {} if us is not None else {"status": "error", "reason": "broken"}
    times = {"median_us": us, "mean_us": us, "spread": 0.01}
    return BenchmarkResult(
        **{"workload": "sparse_decode", "params": params, "backend": backend, **times, **status, **values}
    )


def test_rates_floor_and_best_peer() -> None:
    other_format = {"tokens": 8, "heads": 16, "kv": "bf16"}
    rows = [
        row("triton", 10.0, bytes=10_000_000, flops=2_000_000),
        row("flash_mla", 30.0),
        row("fa3", 20.0, params=other_format),
        row("torch", 1.0),
        row("fa3", None),
    ]
    add_comparisons(rows, read_gbps=2000.0)
    ours = rows[0]
    assert ours.gbps == pytest.approx(1000.0)
    assert ours.tflops == pytest.approx(0.2)
    assert ours.floor_us == pytest.approx(5.0)
    assert ours.floor_percent == pytest.approx(50.0)
    assert ours.best_peer == "fa3 (bf16)"  # the other cache format does the same job; torch is no peer
    assert ours.vs_peer == pytest.approx(0.5)
    assert rows[4].vs_peer is None


def test_other_shapes_are_other_jobs() -> None:
    rows = [row("triton", 10.0), row("fa3", 5.0, params={"tokens": 9, "heads": 16, "kv": "packed"})]
    add_comparisons(rows, None)
    assert rows[0].vs_peer is None
    assert rows[0].floor_percent is None


def test_a_failed_row_has_no_time() -> None:
    failed = row("fa3", None)
    assert not failed.success
    with pytest.raises(RuntimeError, match="broken"):
        failed.mean_time  # noqa: B018
    assert row("fa3", 2.0).mean_time == pytest.approx(2e-6)


def test_speed_up_over_a_baseline(tmp_path: Path) -> None:
    """Ratio and percent saved, in the row and so in every file that has it."""
    params = {"tokens": 8, "dtype": "bf16"}
    rows = [row(b, us, workload="concat_k", params=params) for b, us in (("torch_cat", 8.0), ("triton", 2.0))]
    add_comparisons(rows, None, "torch_cat")
    assert [(r.speedup, r.reduction) for r in rows] == [(1.0, 0.0), (4.0, 75.0)]
    formatter = ResultsFormatter(ENVIRONMENT, baseline="torch_cat")
    formatter.save_json(rows, tmp_path / "a.json")
    formatter.save_csv(rows, tmp_path / "a.csv")
    assert json.loads((tmp_path / "a.json").read_text())["rows"][1]["speedup"] == 4.0
    with (tmp_path / "a.csv").open() as file:
        assert [(line["speedup"], line["reduction"]) for line in csv.DictReader(file)] == [
            ("1.0", "0.0"),
            ("4.0", "75.0"),
        ]


def test_json_round_trip(tmp_path: Path) -> None:
    rows = [row("triton", 10.0, target_us=7.0), row("fa3", None)]
    formatter = ResultsFormatter({"device": "x"}, {"read_gbps": 5.0}, "ops", "", complete=True)
    formatter.save_json(rows, tmp_path / "a.json")
    loaded, again = load_json(tmp_path / "a.json")
    assert loaded == formatter
    assert again == rows
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_csv_has_every_parameter(tmp_path: Path) -> None:
    rows = [row("triton", 10.0), row("torch", 3.0, workload="concat_k", params={"dtype": "fp8"})]
    environment = {"device": "x", "commit": "c", "libraries": {"torch": "2", "triton": "3"}}
    ResultsFormatter(environment).save_csv(rows, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["param.tokens"], first["param.dtype"], first["median_us"]) == ("8", "", "10.0")
    assert (second["param.tokens"], second["param.dtype"]) == ("", "fp8")
    for line in (first, second):
        assert (line["environment.device"], line["environment.libraries"]) == ("x", "torch 2, triton 3")


@pytest.mark.parametrize(
    ("before", "after", "spread", "verdict"),
    [
        (10.0, 10.2, 0.0, "same within noise"),
        (10.0, 10.5, 0.0, "slower"),
        (10.0, 9.5, 0.0, "faster"),
        (10.0, 10.5, 0.04, "same within noise"),  # both spreads together are 8%
        (10.0, 20.0, 0.04, "slower"),
        (None, 10.0, 0.0, "error -> ok"),
        (10.0, None, 0.0, "ok -> error"),
        (None, None, 0.0, "error"),
    ],
)
def test_noise_verdict(before: float | None, after: float | None, spread: float, verdict: str) -> None:
    [result] = compare.compare([row("triton", before, spread=spread)], [row("triton", after, spread=spread)])
    assert result.verdict == verdict


def test_rows_of_one_file_only() -> None:
    verdicts = {c.row.backend: c.verdict for c in compare.compare([row("a", 1.0)], [row("b", 1.0)])}
    assert verdicts == {"a": "only in the first", "b": "only in the second"}


def test_compare_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, us in (("a", 10.0), ("b", 20.0)):
        ResultsFormatter({"device": name}).save_json([row("triton", us)], tmp_path / f"{name}.json")
    assert compare.compare_files(tmp_path / "a.json", tmp_path / "b.json") == 1
    out = capsys.readouterr().out
    assert "device: a -> b" in out
    assert "2.000" in out
    assert compare.compare_files(tmp_path / "b.json", tmp_path / "a.json") == 0


def test_crossover() -> None:
    def pair(q_len: int, decode: float, prefill: float) -> list[BenchmarkResult]:
        times = {"decode": decode, "prefill": prefill}
        return [
            row("triton", us, workload="mla_batch", params={"batch_spec": f"2q{q_len}s1k", "pipeline": name})
            for name, us in times.items()
        ]

    rows = [*pair(1, 1, 9), *pair(4, 9, 8), *pair(16, 9, 10), *pair(64, 20, 12), *pair(256, 90, 15)]
    assert crossovers(rows) == {"triton": {2: 64}}  # 4 does not count: decode wins again at 16
    assert crossovers(pair(1, 1, 9)) == {"triton": {2: None}}
    text = "\n".join(tables(rows))
    assert "| query length | 64 |" in text
    assert "| 2 | 1 / 9 | 9 / 8 | 9 / 10 | 20 / 12 | 90 / 15 |" in text


def test_target_verdicts() -> None:
    goal = row("triton", 1.0, target_us=10.0)
    assert report_tables.verdict(goal, row("triton", 9.0), None) == "target met"
    assert (
        report_tables.verdict(goal, row("triton", 12.0), row("fa3", 24.0)) == "**missed by 20%**, 2.00x faster than fa3"
    )
    assert report_tables.verdict(goal, row("cuda", 10.0), row("fa3", 5.0)) == "target met, fa3 is 2.00x faster"
    assert report_tables.verdict(goal, row("cuda", 10.0), row("fa3", 10.1)) == "target met, level with fa3"
    assert report_tables.verdict(goal, None, row("fa3", 10.1)) == "**no result of ours**"


def test_targets_relative_to_the_best_peer() -> None:
    goal = row("triton", 1.0, target_vs_peer=0.5)
    assert report_tables.verdict(goal, row("triton", 5.0), row("fa3", 10.0)) == "target met, 2.00x faster than fa3"
    assert report_tables.verdict(goal, row("triton", 10.0), row("fa3", 10.0)) == "**missed by 100%**, level with fa3"
    assert report_tables.verdict(goal, row("triton", 5.0), None) == "no peer ran"


def test_the_page_is_of_the_present_results_and_notes() -> None:
    files = report.in_order(list((report.HERE / "results").glob("*.json")))
    assert (report.HERE / "RESULTS.md").read_text() == report.page(files), "run `python -m benchmarks report`"


def test_report_page(tmp_path: Path) -> None:
    rows = [
        row("triton", 9.0, target_us=7.0),
        row("cuda", 6.0, target_us=7.0),
        row("default", 6.1, target_us=7.0),
        row("fa3", 15.0, target_us=7.0),
        row("aiter", None, target_us=7.0),
    ]
    add_comparisons(rows, 4000.0)
    formatter = ResultsFormatter(ENVIRONMENT, {"read_gbps": 4000.0}, "ops", complete=True)
    formatter.save_json(rows, tmp_path / "ops-x.json")
    text = report.page([tmp_path / "ops-x.json"])
    assert "| 7 | 6.00 (cuda) | 6.10 | 15.00 (fa3) |" in text
    assert "target met, 2.50x faster than fa3" in text
    assert "| [ops](#ops) ([data](results/ops-x.json)) | 4 timed of 5 | 1 / 0 / 0 | 2.50 (2.50 to 2.50) |" in text
    assert "`aiter`, 1 case, error: broken" in text
    assert "ncomplete" not in text
    assert "earlier measurement" not in text  # the baseline is of another device
    whole = len(configs.load(SUITE / "configs" / "ops.yaml").cases)
    assert f"{whole - 1} of {whole} not measured" in text


def test_unfinished_results_are_said_to_be_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    ResultsFormatter(ENVIRONMENT, {}, "a").save_json([row("triton", 1.0)], path)
    assert json.loads(path.read_text())["complete"] is False
    assert "**Incomplete**" in report.page([path])


def test_many_cases_become_a_grid() -> None:
    """Rows of the grid are heads and format, columns tokens; the faster side is bold, ours with its floor."""
    rows = []
    for heads in (8, 16, 32):
        for tokens in (1, 2, 4, 8, 16, 32):
            params = {"tokens": tokens, "heads": heads, "kv": "bf16"}
            rows += [
                row("triton", 10.0, params=params, bytes=4000),
                row("fa3", 5.0 if tokens == 8 else 20.0, params=params),
            ]
    add_comparisons(rows, 1.0)
    text = "\n".join(report_tables.case_tables(rows))
    assert "| sparse_decode, tokens: | 1 | 2 | 4 | 8 | 16 | 32 | ours | best peer |" in text
    assert text.count("| **10.0** / 20.0 (40%) ") == 15
    assert text.count("| 10.0 / **5.0** (40%) ") == 3
    assert [line.split(" |")[0] for line in text.splitlines() if "triton" in line] == [
        "| heads=8",
        "| heads=16",
        "| heads=32",
    ]


def test_equal_requests_spread_over_the_grid() -> None:
    rows = [
        row("triton", 10.0, workload="dense_decode", params={"batch_spec": f"{b}q1s{s}k", "heads": h})
        for b in (1, 8, 32)
        for s in (1, 2, 4)
        for h in (16, 128)
    ]
    text = "\n".join(report_tables.case_tables(rows))
    assert "| dense_decode, context: | 1024 | 2048 | 4096 |" in text
    assert "heads=128 batch=32" in text
    add_comparisons(rows, None)
    for r in rows:
        r.gbps = 321.0
    assert "321 / -" in "\n".join(report_tables.case_tables(rows, unit="GB/s"))


def test_speed_up_over_the_baseline_in_the_page() -> None:
    params = {"tokens": 8, "dtype": "bf16"}
    rows = [row(b, us, workload="concat_k", params=params) for b, us in (("torch_cat", 8.0), ("triton", 2.0))]
    assert "| 4.00x | 75% |" in "\n".join(report_tables.case_tables(rows, "torch_cat"))


def test_peers_against_the_baseline() -> None:
    """Every earlier number has a case that the suite's configurations can measure; noise is judged per case."""
    data = peer_baseline.load()
    known = {
        (case.workload, name)
        for path in (SUITE / "configs").glob("*.yaml")
        for case in configs.load(path).cases
        for name in backends.choose(case.backends, case.workload, "cuda:0")
    }
    for table in data["tables"]:
        assert (table["workload"], table.get("now", table["backend"])) in known
        assert all(len(times) == len(table["columns"]) for times in table["us"].values())
    same = row("flash_mla_planned", 20.95, params={"tokens": 1, "heads": 16, "kv": "packed", "topk": 2048})
    slower = row("flash_mla_planned", 30.0, params={"tokens": 8, "heads": 16, "kv": "packed"})
    spec = row(
        "sglang_triton", 24.3, workload="dense_decode", params={"batch_spec": "1q1s1024", "heads": 16, "page_size": 64}
    )
    found = peer_baseline.pairs([same, slower, spec, row("fa3_planned", None)], data["device"])
    assert [(p.before_us, p.same) for p in found] == [(20.9, True), (26.5, False), (24.3, True)]
    assert peer_baseline.pairs([same], "another device") == []
    missing = peer_baseline.missing(found)
    assert missing["sparse_decode", "flash_mla_planned"] == 48
    assert missing["dense_decode", "sglang_triton"] == 23
    text = "\n".join(peer_baseline.table(found))
    assert "| sparse_decode | flash_mla_planned | 2 | 1 |" in text
    assert "30.0 for 26.5 us" in text
