"""What the public documents behind this suite promise, line by line; each test is named after its line.

000: vLLM's benchmark of the MLA key's concatenation. 001: vLLM's attention benchmark suite. 003: SGLang PR 6929, the
CUTLASS MLA table. Commands keep their words; modules are imported from the package (`benchmarks.common`, not `common`).
"""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cli, schema
from benchmarks.batch_spec import format_batch_spec, get_batch_stats, parse_batch_spec
from benchmarks.common import BenchmarkConfig, BenchmarkResult, ResultsFormatter, add_comparisons
from benchmarks.mla_runner import benchmark_method, run_mla_benchmark
from benchmarks.run import sweep
from benchmarks.run.measure import measure

from .conftest import SUITE

CPU = torch.device("cpu")


# ---- 000


def test_000_signature() -> None:
    """benchmark_method(method: Callable, k_nope, k_pe, num_warmup: int = 10, num_iters: int = 100) -> float"""
    signature = inspect.signature(benchmark_method)
    assert list(signature.parameters) == ["method", "k_nope", "k_pe", "num_warmup", "num_iters"]
    assert {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty} == {
        "num_warmup": 10,
        "num_iters": 100,
    }
    assert signature.return_annotation == "float"


def test_000_usage_examples() -> None:
    """cat_time = benchmark_method(cat_method, k_nope, k_pe); speedup = cat_time / direct_time"""

    def cat_method(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        return torch.cat((k_nope, k_pe.expand((*k_nope.shape[:-1], -1))), dim=-1)

    calls = []

    def direct_copy_method(k_nope: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        calls.append(k_nope.shape)
        k = torch.empty((*k_nope.shape[:-1], k_nope.shape[-1] + k_pe.shape[-1]), dtype=k_nope.dtype)
        k[..., : k_nope.shape[-1]] = k_nope
        k[..., k_nope.shape[-1] :] = k_pe
        return k

    k_nope, k_pe = torch.randn(8, 4, 128), torch.randn(8, 1, 64)
    cat_time = benchmark_method(cat_method, k_nope, k_pe)
    direct_time = benchmark_method(direct_copy_method, k_nope, k_pe, num_warmup=25, num_iters=7)
    assert cat_time / direct_time > 0
    assert len(calls) >= 25 + 7  # more warm-up than asked for only until it is stable


def test_000_tests_32_to_65536_tokens_with_the_dimensions_of_deepseek_v3_in_both_dtypes() -> None:
    """batch sizes from 32 to 65536 tokens ... 128 heads ... both bfloat16 and float8_e4m3fn"""
    cases = [c for c in schema.load(SUITE / "configs" / "mla_concat.yaml").cases if c.workload == "concat_k"]
    tokens = {c.params["tokens"] for c in cases}
    assert (min(tokens), max(tokens)) == (32, 65536)
    assert {c.params["dtype"] for c in cases} == {"bf16", "fp8"}
    assert {c.params.get("heads", 128) for c in cases} == {128}


def test_000_outputs() -> None:
    """batch_size | cat_time | direct_time | speedup (cat_time / direct_time) | reduction (percentage)"""
    baseline = schema.load(SUITE / "configs" / "mla_concat.yaml").baseline
    params = {"tokens": 32, "heads": 2}
    rows = [measure("concat_k", params, backend, CPU, schema.Settings(repeats=1)) for backend in (baseline, "torch")]
    add_comparisons(rows, None, baseline)
    cat, direct = rows
    assert direct.params["tokens"] == 32
    assert direct.speedup == cat.median_us / direct.median_us
    assert direct.reduction == 100 * (1 - direct.median_us / cat.median_us)


# ---- 001: commands

COMMANDS_001 = """
python benchmark.py --config configs/mla_decode.yaml
python benchmark.py --config configs/mla_mixed_batch.yaml
python benchmark.py --config configs/speculative_decode.yaml
python benchmark.py --config configs/standard_attention.yaml
python benchmark.py --config configs/reorder_threshold.yaml
python benchmark.py --backends flash flashinfer --batch-specs "q2k" "8q1s1k" "2q2k_32q1s1k" --output-csv results.csv
python benchmark.py --backends flash triton flashinfer --batch-specs "q2k" "8q1s1k" "2q2k_32q1s1k" --num-layers 10 \
--repeats 5 --output-csv results.csv
python benchmark.py --backends cutlass_mla flashinfer_mla flashattn_mla flashmla --batch-specs "64q1s1k" "64q1s4k" \
--output-csv mla_results.csv
python benchmark.py --backend cutlass_mla --batch-specs "64q1s1k" "64q1s4k" "64q1s16k" --sweep-param num_kv_splits \
--sweep-values 1 2 4 8 16 --output-json optimal_splits.json
python benchmark.py --backend flashmla --batch-specs "q4s1k" "q8s2k" --sweep-param reorder_batch_threshold \
--sweep-values 1 4 16 64 256 512 --output-csv threshold_sweep.csv
""".strip().splitlines()


@pytest.mark.parametrize("line", COMMANDS_001)
def test_001_command(line: str) -> None:
    """Means what it says: the batches, values and backends of the line are those that would be measured on a GPU."""
    words = shlex.split(line)[2:]
    options = cli.build_parser().parse_args([*words, "--device", "cuda:0"])
    config = cli.configuration(options)
    rows = sweep.plan(config, "cuda:0")
    assert rows
    if options.batch_specs:
        values = options.sweep_values or [None]
        asked = [(spec, value) for spec in options.batch_specs for value in values]
        assert [(c.params["batch_spec"], c.params.get(options.sweep_param)) for c in config.cases] == asked
        assert len(rows) == len(asked) * len(options.backends or [options.backend])
    if options.num_layers:
        assert {c.params["min_sets"] for c in config.cases} == {options.num_layers}
    assert config.settings.repeats == (options.repeats or config.settings.repeats)


def test_001_command_from_the_suites_folder(tmp_path: Path) -> None:
    """cd benchmarks/...; python benchmark.py --config configs/mla_decode.yaml (one backend of it, on a CPU)"""
    output = tmp_path / "a.csv"
    words = [*shlex.split(COMMANDS_001[0])[1:], "--quick", "--device", "cpu", "--backend", "torch", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, *words, "--output-csv", str(output)], cwd=SUITE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert output.read_text().count("\n") == 3


OPTIONS_001 = """
--config CONFIG
--backends BACKEND [BACKEND ...]
--backend BACKEND
--batch-specs SPEC [SPEC ...]
--num-layers N
--head-dim N
--num-q-heads N
--num-kv-heads N
--block-size N
--device DEVICE
--repeats N
--warmup-iters N
--profile-memory
--sweep-param PARAM
--sweep-values N [N ...]
--output-csv FILE
--output-json FILE
""".strip().splitlines()


@pytest.mark.parametrize("line", OPTIONS_001)
def test_001_option(line: str) -> None:
    assert " ".join(line.split()) in " ".join(cli.build_parser().format_help().split())


@pytest.mark.parametrize("name", ["cutlass_mla", "flashinfer_mla", "flashattn_mla", "flashmla"])
def test_001_mla_backend(name: str) -> None:
    for workload in ("dense_decode", "mla_batch"):
        assert cli.configuration(cli.build_parser().parse_args(["--backend", name, "--workload", workload])).cases
        from benchmarks import backends

        assert backends.choose([name], workload, "cuda:0")


# ---- 001: grammar

GRAMMAR_001 = {
    '"q2k"              # 2048-token prefill (q_len=2048, seq_len=2048)': [(2048, 2048)],
    '"q1s1k"            # Decode: 1 token with 1K sequence': [(1, 1024)],
    '"8q1s1k"           # 8 decode requests': [(1, 1024)] * 8,
    '"q4s1k"            # 4-token extend (e.g., spec decode)': [(4, 1024)],
    '"2q2k_32q1s1k"     # Mixed: 2 prefills + 32 decodes': [(2048, 2048)] * 2 + [(1, 1024)] * 32,
    '"16q4s1k"          # 16 spec decode (4 tokens each)': [(4, 1024)] * 16,
}


@pytest.mark.parametrize("line", GRAMMAR_001)
def test_001_grammar(line: str) -> None:
    assert [r.as_tuple() for r in parse_batch_spec(line.split('"')[1])] == GRAMMAR_001[line]


# ---- 001: the Python API


@pytest.mark.parametrize(
    ("line", "sweep_values"),
    [
        ('result = run_mla_benchmark("cutlass_mla", config, num_kv_splits=4)', {"num_kv_splits": 4}),
        ('result = run_mla_benchmark("flashinfer_mla", config)', {}),
        (
            'result = run_mla_benchmark("flashattn_mla", config, reorder_batch_threshold=64)',
            {"reorder_batch_threshold": 64},
        ),
        ('result = run_mla_benchmark("flashmla", config, reorder_batch_threshold=64)', {"reorder_batch_threshold": 64}),
    ],
)
def test_001_mla_runner(line: str, sweep_values: dict) -> None:
    """The config of the page with a smaller batch, on a CPU, where these kernels say why they cannot run."""
    config = BenchmarkConfig(
        backend="cutlass_mla",
        batch_spec="2q1s40",
        num_layers=10,
        head_dim=576,
        num_q_heads=128,
        num_kv_heads=1,
        block_size=128,
        device="cpu",
        repeats=5,
        warmup_iters=3,
    )
    result = run_mla_benchmark(line.split('"')[1], config, **sweep_values)
    assert (result.status, bool(result.reason)) == ("unavailable", True)
    assert sweep_values.items() <= result.params.items()
    assert (result.params["heads"], result.params["page_size"], result.params["min_sets"]) == (128, 128, 10)


def test_001_mean_time() -> None:
    """print(f"Time: {result.mean_time:.6f}s")"""
    config = BenchmarkConfig("torch", "2q1s40", 2, num_q_heads=2, device="cpu", repeats=1, warmup_iters=1)
    result = run_mla_benchmark("torch", config, num_kv_splits=4, pool_slots=128)
    assert float(f"{result.mean_time:.6f}") == pytest.approx(result.mean_us / 1e6, abs=1e-6)


def test_001_a_bad_config_is_refused_where_it_is_made() -> None:
    for bad in ({"num_q_heads": 0}, {"batch_spec": "q1s"}, {"repeats": 0}, {"block_size": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BenchmarkConfig(**{"backend": "torch", "batch_spec": "q1s8", **bad})
    with pytest.raises(ValueError, match="'flash_mlaa'"):
        run_mla_benchmark("flash_mlaa", BenchmarkConfig("torch", "q1s8", device="cpu"))


def test_001_format_batch_spec() -> None:
    """parse_batch_spec("2q2k_q4s1k_32q1s1k"); "2 prefill (2x2k), 1 extend (1xq4kv1k), 32 decode (32x1k)" """
    requests = parse_batch_spec("2q2k_q4s1k_32q1s1k")
    assert format_batch_spec(requests) == "2 prefill (2x2k), 1 extend (1xq4kv1k), 32 decode (32x1k)"


def test_001_batch_stats() -> None:
    """stats['total_tokens'], stats['num_decode'], stats['num_prefill']"""
    stats = get_batch_stats(parse_batch_spec("2q2k_q4s1k_32q1s1k"))
    assert (stats["total_tokens"], stats["num_decode"], stats["num_prefill"]) == (2 * 2048 + 4 + 32, 32, 2)


def test_001_results_formatter(tmp_path: Path) -> None:
    """formatter = ResultsFormatter(); formatter.save_csv(results, ...); formatter.save_json(results, ...)"""
    results = [BenchmarkResult("concat_k", {"tokens": 3}, "torch", median_us=1.0)]
    formatter = ResultsFormatter()
    formatter.save_csv(results, str(tmp_path / "output.csv"))
    formatter.save_json(results, str(tmp_path / "output.json"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["output.csv", "output.json"]


# ---- 003


@pytest.mark.parametrize("block_size", [1, 32, 64, 128])
def test_003_table(block_size: int) -> None:
    """block_size=N: batch_size 1 8 32 64 128 256, seq_len 1 64 ... 8192, 128 / 64 / 32 / 16 heads, GB/s"""
    config = schema.load(SUITE / "configs" / "cutlass_mla.yaml")
    assert config.unit == "GB/s"
    have = set()
    for case in config.cases:
        requests = parse_batch_spec(case.params["batch_spec"])
        if case.params["page_size"] == block_size and "cutlass" in case.backends:
            have.add((len(requests), requests[0].kv_len, case.params["heads"]))
    assert have == {
        (batch, seq_len, heads)
        for batch in (1, 8, 32, 64, 128, 256)
        for seq_len in (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
        for heads in (128, 64, 32, 16)
    }


def test_003_num_kv_splits() -> None:
    """num_kv_splits=-1: the kernel's choice, here null"""
    config = schema.load(SUITE / "configs" / "cutlass_mla.yaml")
    assert all(case.params.get("num_kv_splits") is None for case in config.cases)
