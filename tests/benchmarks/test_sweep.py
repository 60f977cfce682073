"""Configurations, resuming after a kill, failing backends, and the command line, on a CPU with the torch backend."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import backends, mla_runner
from benchmarks import cli as benchmark
from benchmarks import schema as configs
from benchmarks.common import ERROR, OK, UNAVAILABLE, BenchmarkConfig, BenchmarkResult, load_json
from benchmarks.run import child, environment, measure, prepare, suite, sweep
from benchmarks.run.child import Child
from benchmarks.run.measure import Settings
from benchmarks.timing import clock
from benchmarks.workloads import WORKLOADS, indexer
from nsa_backend_plugin.ops import dispatch
from nsa_backend_plugin.ops.dispatch import operations
from tests.processes import HANGS_AFTER

from .conftest import SUITE, code

CONFIGS = sorted((SUITE / "configs").glob("*.yaml"))
FAST = Settings(repeats=1, warmup_iters=1, budget_s=0.0)
CPU = torch.device("cpu")
SMALL = {"tokens": 3, "heads": 2}


def small_config(**extra) -> configs.Config:
    return configs.from_mapping(
        {"workload": "concat_k", "backends": ["torch"], "params": {"tokens": [1, 2, 3, 4], "heads": 2}, **extra}
    )


def run(config: configs.Config, path: Path, **arguments) -> tuple[list[BenchmarkResult], bool]:
    journal = sweep.Journal.open(path, "mark")
    return sweep.run(sweep.plan(config, "cpu"), "cpu", FAST, journal, **arguments)


@pytest.fixture
def one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that calls once: these tests are about what is run, and the CPU is slow at it."""

    def time_calls(calls, device, **settings) -> clock.Timing:
        calls[0]()
        return clock.summarize([1.0], 1, "wall")

    monkeypatch.setattr(measure, "time_calls", time_calls)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_runs_at_quick_size(path: Path, tmp_path: Path, one_call: None) -> None:
    config = configs.load(path, quick=True)
    for i, case in enumerate(config.cases):
        names = backends.names(case.workload)
        chosen = ("default" if "default" in names else "torch", *(n for n in names if n == "torch_cat"))
        config.cases[i] = configs.Case(case.workload, case.params, chosen)
    results, complete = run(config, tmp_path / "rows.jsonl")
    assert complete
    assert results
    assert {(r.status, r.reason) for r in results} == {(OK, "")}
    assert all(r.median_us and r.distance is not None for r in results)


@pytest.mark.parametrize("name", [w.name for w in WORKLOADS.values() if w.operations])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_and_interpreted_triton_run_every_workload(backend: str, name: str, one_call: None) -> None:
    params = next(c.params for p in CONFIGS for c in configs.load(p, quick=True).cases if c.workload == name)
    result = measure.measure(name, params, backend, CPU, FAST)
    assert (result.status, result.reason) == (OK, "")


def test_every_operation_is_measured() -> None:
    """Each registry operation has a workload, and each workload a configuration."""
    assert {o.name for o in operations()} == {name for w in WORKLOADS.values() for name in w.operations}
    assert {c.workload for p in CONFIGS for c in configs.load(p).cases} == set(WORKLOADS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_plans_at_full_size(path: Path) -> None:
    config = configs.load(path)
    assert config.description
    rows = sweep.plan(config, "cuda:0")
    assert len({row.key() for row in rows}) == len(rows)


def test_all_named_configs_exist() -> None:
    from benchmarks.run.suite import ORDER

    assert sorted(p.stem for p in CONFIGS) == sorted(ORDER)


def test_ops_config_has_a_target_for_every_row_of_the_table() -> None:
    config = configs.load(SUITE / "configs" / "ops.yaml")
    targets = {(c.workload, *c.params.values()): c.target_us for c in config.cases if c.target_us}
    assert targets["sparse_decode", "packed", 16, 128] == 58
    assert targets["sparse_decode", "packed", 32, 8] == 14
    assert targets["sparse_decode", "bf16", 8, 1] == 7.5
    assert targets["dense_decode", "128q1s8k", 64, 64] == 500
    assert targets["dense_decode", "q1s8k", 16, 64] == 12
    assert ("dense_decode", "q1s8k", 64, 64) not in targets
    assert len(targets) == 15 + 10 + 4 + 2 + 3 + 2 + 6 + 2 + 2
    relative = [(c.workload, c.target_vs_peer) for c in config.cases if c.target_vs_peer]
    assert sorted(relative) == [("logits_paged", 1.15)] * 6 + [("sparse_prefill", 0.667)] * 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "workload"),
        ({"workload": "nope"}, "nope"),
        ({"workload": "topk", "parms": {}}, "parms"),
        ({"workload": "topk", "params": {"row": 1}}, "row"),
        ({"workload": "topk", "params": {"rows": []}}, "rows"),
        ({"workload": "topk", "mode": "fast"}, "mode"),
        ({"workload": "topk", "backends": "torch"}, "backends='torch': expected a list"),
        ({"workload": "dense_decode", "batch_specs": "q2k"}, "batch_specs='q2k': expected a list"),
        ({"workload": "topk", "unit": "furlongs"}, "unit"),
        ({"workload": "dense_decode", "batch_specs": ["8q1s1k_x"]}, "segment 'x'"),
    ],
)
def test_bad_configs(content: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        configs.from_mapping(content)


def test_what_a_grown_configuration_lacks() -> None:
    config = small_config(params={"tokens": [1, 2, 3], "heads": 2})
    rows = [sweep.Row(case, "torch").failed("") for case in config.cases[:2]]
    assert [case.params["tokens"] for case in configs.unmeasured(config, rows)] == [3]


def test_finished_rows_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    measured: list[int] = []

    def stop_after_two(result: BenchmarkResult, done: int, total: int) -> None:
        measured.append(result.params["tokens"])
        if len(measured) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small_config(), path, on_row=stop_after_two)
    first = json.loads(path.read_text().splitlines()[1])["result"]
    path.write_text(path.read_text() + '{"fingerprint": "mark", "key": "half a li')  # a kill in the middle of a write

    measured.clear()
    results, complete = run(small_config(), path, on_row=lambda r, done, total: measured.append(r.params["tokens"]))
    assert complete
    assert measured == [3, 4]
    assert [r.params["tokens"] for r in results] == [1, 2, 3, 4]
    assert results[0].median_us == first["median_us"]
    assert sweep.Journal.open(path, "mark").finished(sweep.plan(small_config(), "cpu")[3]) is not None
    other = sweep.Journal.open(path, "another environment")
    assert (other.rows, other.others) == ({}, 4)


def test_failed_rows_are_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    [row, *_] = sweep.plan(small_config(), "cpu")
    sweep.Journal.open(path, "mark").add(row, row.failed("the process ended with code -11"))
    results, _ = run(small_config(), path)
    assert results[0].status == OK


def test_the_deadline_keeps_what_is_done(tmp_path: Path) -> None:
    results, complete = run(small_config(), tmp_path / "rows.jsonl", deadline=time.monotonic() - 1)
    assert (results, complete) == ([], False)


def test_the_fingerprint_follows_settings_and_environment() -> None:
    env = {"device": "a", "driver": "1", "libraries": {}, "sources": "x", "date": "today"}
    mark = sweep.fingerprint(FAST, env)
    assert sweep.fingerprint(FAST, {**env, "date": "tomorrow"}) == mark
    assert sweep.fingerprint(FAST, {**env, "sources": "y"}) != mark
    assert sweep.fingerprint(Settings(repeats=2), env) != mark


def test_a_crashing_row_costs_one_row(tmp_path: Path) -> None:
    """The child dies on tokens=2 and 4; other rows keep their results, and a third death is not provoked."""
    script = tmp_path / "worker_that_dies.py"
    script.write_text(
        "import os, sys\n"
        "from benchmarks.run import measure, worker\n"
        "real = measure.measure\n"
        "def dying(name, params, *rest):\n"
        "    if params['tokens'] in (2, 4, 5):\n"
        "        print('out of luck', file=sys.stderr, flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return real(name, params, *rest)\n"
        "measure.measure = dying\n"
        "sys.exit(worker.main())\n"
    )
    config = small_config(params={"tokens": [1, 2, 3, 4, 5], "heads": 2})
    journal = sweep.Journal.open(tmp_path / "rows.jsonl", "mark")
    with Child([str(script)]) as child:
        results, complete = sweep.run(sweep.plan(config, "cpu"), "cpu", FAST, journal, child=child)
    assert complete
    assert [r.status for r in results] == [OK, ERROR, OK, ERROR, ERROR]
    assert "code -9" in results[1].reason
    assert "out of luck" in results[1].reason
    assert results[4].reason == f"not tried after 2 crashes: {results[3].reason}"
    assert journal.ceilings["read_gbps"] > 0


def test_last_words_are_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the thread that reads them may come after the child's end."""
    keep = child._keep

    def late(*arguments: object) -> None:
        dying._process.wait()
        time.sleep(0.5)
        keep(*arguments)

    monkeypatch.setattr(child, "_keep", late)
    monkeypatch.setattr(child, "LAST_WORDS_S", HANGS_AFTER)
    script = tmp_path / "dies.py"
    script.write_text("import sys\nsys.exit('out of luck')\n")
    with Child([str(script)]) as dying:
        assert dying.run({}, lambda event: None) == "the process ended with code 1: out of luck"


def test_a_wrong_backend_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_backend_plugin.ops.concat import reference

    monkeypatch.setattr(reference, "mla_k", lambda call: call.output().zero_())
    dispatch.forget()
    # The reference is the broken one here, so the correct backend is the one that disagrees.
    result = measure.measure("concat_k", {"tokens": 5, "heads": 2}, "torch_cat", CPU, FAST)
    monkeypatch.undo()
    dispatch.forget()
    assert result.status == ERROR
    assert "wrong result" in result.reason
    assert result.median_us is None


def test_backends_that_cannot_run_say_why() -> None:
    with pytest.raises(ValueError, match=r"backend='nonsense': expected all or a name .* torch_cat"):
        measure.measure("concat_k", SMALL, "nonsense", CPU, FAST)
    peer = measure.measure("concat_k", SMALL, "sglang_jit", CPU, FAST)
    assert (peer.status, peer.reason) == (UNAVAILABLE, "needs a GPU")


def test_a_chain_may_mix_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "a+b" runs a for the first operation and b for the second, and is ours if both are."""
    assert "triton+cuda" in backends.names("indexer_chain")
    assert backends.is_own("triton+cuda", "indexer_chain")
    assert backends.is_peer("triton", "standard")  # not an operation of the library: SGLang's kernel
    params = {"batch": 1, "context": 70, "heads": 2, "k": 32}
    refused = measure.measure("indexer_chain", params, "triton+cuda", CPU, FAST)
    assert refused.status == UNAVAILABLE
    assert "CUDA" in refused.reason
    monkeypatch.setitem(WORKLOADS, "indexer_chain", dataclasses.replace(indexer.CHAIN, mixed=("torch+triton",)))
    monkeypatch.setattr(indexer, "CHAIN", WORKLOADS["indexer_chain"])
    seen: list[str | None] = []
    real = indexer.topk.select
    monkeypatch.setattr(
        indexer.topk, "select", lambda *a, impl=None, **k: (seen.append(impl), real(*a, impl=impl, **k))[1]
    )
    mixed = measure.measure("indexer_chain", params, "torch+triton", CPU, FAST)
    assert (mixed.status, mixed.reason) == (OK, "")
    assert set(seen) == {"triton", "torch"}  # the reference check uses torch


def test_an_exception_is_an_error_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import peers

    def broken(problem):
        raise RuntimeError("no such kernel")

    key = ("concat_k", "torch_cat")
    monkeypatch.setitem(peers.PEERS, key, peers.Peer(*key, broken, gpu=False))
    result = measure.measure("concat_k", SMALL, "torch_cat", CPU, FAST)
    assert (result.status, result.reason) == (ERROR, "RuntimeError: no such kernel")


def test_all_leaves_the_reference_out_on_a_gpu_only() -> None:
    assert "torch" in backends.choose(["all"], "topk", "cpu")
    assert "torch" not in backends.choose(["all"], "topk", "cuda:0")
    assert backends.choose(["torch", "flashmla", "torch"], "dense_decode", "cuda:0") == ["torch", "flash_mla"]
    assert backends.choose(["torch", "flashmla"], "topk", "cuda:0") == ["torch"]
    known = {n for w in ("dense_decode", "logits_paged") for n in backends.names(w)}
    assert set(backends.ALIASES.values()) <= known | {"deep_gemm"}


@pytest.mark.parametrize(
    ("spec", "sweep_params", "workload"),
    [
        ("2q1s40", {"num_kv_splits": 2}, "dense_decode"),
        ("2q1s40", {"reorder_batch_threshold": 4}, "mla_batch"),
        ("q4s20_q1s30", {"reorder_batch_threshold": 4}, "mla_batch"),
    ],
)
def test_python_api(spec: str, sweep_params: dict, workload: str) -> None:
    config = BenchmarkConfig("torch", spec, 1, num_q_heads=2, block_size=16, device="cpu", repeats=1, warmup_iters=1)
    result = mla_runner.run_mla_benchmark("torch", config, pool_slots=128, **sweep_params)
    assert (result.status, result.reason) == (OK, "")
    assert result.workload == workload
    assert result.mean_time > 0
    with pytest.raises(ValueError, match="num_splits"):
        mla_runner.run_mla_benchmark("torch", config, num_splits=2)


def options(*words: str):
    return benchmark.build_parser().parse_args(words)


def test_command_line_sweep() -> None:
    words = ("--backend", "torch", "--batch-specs", "q1s8", "q2s8", "--sweep-param", "num_kv_splits")
    config = benchmark.configuration(options(*words, "--sweep-values", "1", "2", "--num-q-heads", "4"))
    cases = [(c.workload, c.params["num_kv_splits"], c.params["heads"]) for c in config.cases]
    assert cases == [("dense_decode", 1, 4), ("dense_decode", 2, 4), ("mla_batch", 1, 4), ("mla_batch", 2, 4)]
    standard = benchmark.configuration(options("--backends", "flash", "triton", "--batch-specs", "q1s8"))
    assert standard.cases[0].workload == "standard"


def test_a_cpu_gets_the_small_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", str(SUITE / "configs" / "mla_decode.yaml"), "--device")
    specs = {
        w: benchmark.configuration(options(*words, *w)).cases[0].params["batch_spec"] for w in (("cpu",), ("cuda:0",))
    }
    assert specs == {("cpu",): "q1s64", ("cuda:0",): "1q1s1k"}
    assert "--full" in capsys.readouterr().out
    assert benchmark.configuration(options(*words, "cpu", "--full")).cases[0].params["batch_spec"] == "1q1s1k"


def test_a_row_that_two_runs_name_is_measured_once() -> None:
    runs = [{"params": {"tokens": [1, 2]}}, {"params": {"tokens": [2, 3]}}]
    config = configs.from_mapping({"workload": "concat_k", "backends": ["torch"], "params": {"heads": 2}, "runs": runs})
    assert [row.case.params["tokens"] for row in sweep.plan(config, "cpu")] == [1, 2, 3]


def test_compilation_runs_every_row_once(tmp_path: Path) -> None:
    """Rows of one workload and backend stay together up to a limit, slow compilers first; nothing is measured."""
    config = small_config(backends=["torch", "torch_cat", "triton"])
    rows = sweep.plan(config, "cpu")
    slow = sweep.Row(config.cases[0], "tilelang")
    groups = prepare.groups([*rows, *rows, slow])
    assert [[(r.backend, r.case.params["tokens"]) for r in g] for g in groups[:2]] == [
        [("tilelang", 1)],
        [("torch", n) for n in (1, 2, 3, 4)],
    ]
    assert sum(map(len, groups)) == 13
    many = small_config(params={"tokens": list(range(1, prepare.PART + 3)), "heads": 2})
    assert [len(g) for g in prepare.groups(sweep.plan(many, "cpu"))] == [prepare.PART, 2]
    assert "compiled for 8 rows" in prepare.compile_all(rows[:8], "cpu", 2, HANGS_AFTER)
    assert "compiled for 0 rows" in prepare.compile_all(rows[:8], "cpu", 2, 0.0)


def test_the_suite_keeps_what_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run measures nothing; with other sources or fewer cases it is refused, and measures when forced."""
    words = ["--configs", "mla_concat", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert suite.main([*words, "--compile-seconds", "0"]) == 0
    assert "mla_concat: complete\n" in capsys.readouterr().out
    [path] = tmp_path.iterdir()
    assert path.name == f"mla_concat-{environment.machine('cpu')}.json"
    before = path.read_text()
    assert suite.main(words) == 0
    assert "mla_concat: complete before" in capsys.readouterr().out
    assert path.read_text() == before
    changed = json.loads(before)
    other = {**changed["environment"], "sources": "other"}
    for change in ({"environment": other}, {"rows": changed["rows"][:-20]}):
        path.write_text(json.dumps({**changed, **change}))
        late = [*words, "--compile-seconds", "0", "--total-seconds", "1"]
        assert suite.main(late) == 2
        assert "--force" in capsys.readouterr().err
        assert suite.main([*late, "--force"]) == 75
        assert "mla_concat: incomplete" in capsys.readouterr().out
    path.write_text(json.dumps({**changed, "complete": False}))
    assert suite.main([*words, "--compile-seconds", "0"]) == 0  # an interrupted run's file needs no force
    assert json.loads(path.read_text())["complete"]


def test_a_machines_name_is_part_of_a_files_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, name in (
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("AMD Instinct MI300X", "mi300x"),
    ):
        monkeypatch.setattr(environment, "_device_name", lambda _, device=device: device)
        assert environment.machine("cuda:0") == name


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--batch-specs", "x"),
        ("--batch-specs", "q1s8", "--sweep-param", "heads"),
        ("--batch-specs", "q1s8", "--sweep-param", "nonsense", "--sweep-values", "1"),
        ("--config", "does-not-exist.yaml"),
        ("compare", "one.json"),
        ("compare", "none.json", "nothing.json"),
    ],
)
def test_bad_command_lines(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert code(*words) == 2
    assert "error:" in capsys.readouterr().err


def test_killed_run_resumes(tmp_path: Path) -> None:
    """The real command, killed with SIGKILL after its first rows, then run again."""
    config = tmp_path / "many.yaml"
    tokens = list(range(1, 101))
    config.write_text(f"workload: concat_k\nbackends: [torch]\nparams: {{heads: 4, tokens: {tokens}}}\n")
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "--config", str(config), "--device", "cpu"]
    command += ["--repeats", "3", "--output-json", str(output), "--output-csv", str(tmp_path / "out.csv")]
    journal = tmp_path / "out.json.rows.jsonl"
    child = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.stdout is not None
    # However slowly this process runs, the command cannot end before it is killed: the pipe holds half of its rows.
    fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, 4096)
    for line in child.stdout:
        if line.startswith(b"[3/100]"):
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = len(journal.read_text().splitlines()) - 1  # less the ceilings
    assert 3 <= kept < 100
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert " rows kept from an interrupted run" in again.stdout
    formatter, rows = load_json(output)
    assert formatter.complete
    assert [r.params["tokens"] for r in rows] == tokens
    assert {"device", "driver", "libraries", "commit", "date", "command"} <= set(formatter.environment)
    assert str(tmp_path) not in formatter.environment["command"]
    assert not journal.exists()
