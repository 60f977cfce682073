"""The command refuses what it cannot do before it does anything, and overwrites nothing."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import backends, cli, registry, workloads
from benchmarks.batch_spec import MAX_TOKENS, parse_batch_spec
from benchmarks.report import screen
from nsa_backend_plugin.ops.dispatch import operations
from tests.ops.implementations import OWN

from .conftest import SUITE, code

ONE_ROW = ("--workload", "concat_k", "--param", "tokens=3", "--param", "heads=2", "--device", "cpu", "--repeats", "1")
TORCH = (*ONE_ROW, "--backend", "torch_cat")
MLA = ("--backend", "torch", "--batch-specs", "q1s8", "--device", "cpu")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a command that must fail before it measures anything."""
    assert code(*words) == 2
    said = capsys.readouterr()
    assert "[1/" not in said.out
    assert "Traceback" not in said.err
    return said.err.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def nothing_is_measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "measures" not in request.keywords:
        from benchmarks.run import sweep

        monkeypatch.setattr(sweep, "run", lambda *a, **k: pytest.fail("measured"))


# ---- unknown names, and runs without a time


@pytest.mark.parametrize("words", [MLA[2:], ONE_ROW, ("--config", "mla_concat", "--quick", "--device", "cpu")])
def test_an_unknown_backend_is_an_error_with_the_valid_names(words: tuple[str, ...], capsys) -> None:
    error = refused(capsys, *words, "--backends", "torch", "flash_mlaa")
    assert "'flash_mlaa'" in error
    assert "triton" in error


def test_an_unknown_backend_in_a_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("workload: concat_k\nbackends: [torch, tritn]\n")
    assert "'tritn'" in refused(capsys, "--config", str(path))


@pytest.mark.measures
def test_a_run_in_which_nothing_was_measured_fails(capsys) -> None:
    assert code(*ONE_ROW, "--backend", "sglang_jit") == 1
    said = capsys.readouterr()
    assert "nothing was measured" in said.err
    assert "needs a GPU" in said.out


# ---- options that do not go together


@pytest.mark.parametrize(
    "words",
    [
        ("--batch-specs", "q1s8"),
        ("--workload", "topk"),
        ("--param", "heads=4"),
        ("--num-q-heads", "8"),
        ("--num-kv-heads", "1"),
        ("--num-layers", "3"),
        ("--head-dim", "576"),
        ("--block-size", "64"),
        ("--sweep-param", "heads", "--sweep-values", "1"),
    ],
)
def test_what_a_config_says_is_not_said_again(words: tuple[str, ...], capsys) -> None:
    error = refused(capsys, "--config", "mla_decode", "--device", "cpu", *words)
    assert error == f"benchmarks: error: {words[0]}: not with --config, whose file says what to measure"


def test_how_to_measure_applies_to_a_config() -> None:
    words = ["--config", "mla_decode", "--quick", "--repeats", "2", "--warmup-iters", "1", "--backend", "torch"]
    config = cli.configuration(cli.build_parser().parse_args([*words, "--profile-memory"]))
    assert (config.settings.repeats, config.settings.warmup_iters, config.settings.profile_memory) == (2, 1, True)
    assert config.settings.budget_s == 0.3  # the file's
    assert {case.backends for case in config.cases} == {("torch",)}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--backends", "torch", "--backend", "triton"), "not allowed with argument"),
        (("--quick", "--full"), "not allowed with argument"),
        (("--sweep-param", "num_kv_splits"), "--sweep-param and --sweep-values go together"),
        (("--param", "num_kv_splits=2", "--sweep-param", "num_kv_splits", "--sweep-values", "1"), "--param gives it"),
        (("--param", "heads=2", "--num-q-heads", "4"), "--num-q-heads=4: --param gives heads a value too"),
    ],
)
def test_options_that_contradict_each_other(words: tuple[str, ...], error: str, capsys) -> None:
    assert error in refused(capsys, "--batch-specs", "q1s8", "--device", "cpu", *words)


# ---- values: the option, the value, what was expected


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--num-q-heads", "0"), "--num-q-heads=0: expected greater than or equal to 1"),
        (("--num-q-heads", "-4"), "--num-q-heads=-4: expected greater than or equal to 1"),
        (("--num-q-heads", "100000"), "--num-q-heads=100000: expected less than or equal to 1024"),
        (("--block-size", "0"), "--block-size=0: expected greater than or equal to 1"),
        (("--num-layers", "0"), "--num-layers=0: expected greater than or equal to 1"),
        (("--head-dim", "0"), "--head-dim=0: expected greater than or equal to 1"),
        (("--num-kv-heads", "0"), "--num-kv-heads=0"),
        (("--repeats", "0"), "--repeats=0: expected greater than or equal to 1"),
        (("--repeats", "many"), "--repeats: invalid int value: 'many'"),
        (("--warmup-iters", "-1"), "--warmup-iters=-1: expected greater than or equal to 0"),
        (("--budget-seconds", "0"), "--budget-seconds=0.0: expected more than 0"),
        (("--device", "gpu"), "--device=gpu: expected cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "--device=cuda:99: torch sees"),
        (("--batch-specs", "99999999999q1s64"), "count is 99999999999, expected 1 to 65536"),
        (("--batch-specs", "q1s99999999k"), f"expected at most {MAX_TOKENS}"),
        (("--batch-specs", "\uff11q1s64"), "segment '\uff11q1s64'"),
        (("--param", "heads"), "--param 'heads': expected NAME=VALUE"),
        (("--param", "heads=four"), "heads='four': expected a valid integer"),
        (("--param", "heads=010"), "heads='010': expected a valid integer"),
        (("--param", "headz=4"), "key 'headz': expected one of min_sets, batch_spec, heads"),
        (("--sweep-param", "headz", "--sweep-values", "4"), "key 'headz': expected one of"),
        (("--workload", "top"), "workload='top': expected one of dense_decode"),
        (("--workload", "topk"), "--batch-specs: workload topk has no batch"),
    ],
)
def test_values_are_checked_before_anything_is_built(words: tuple[str, ...], error: str, capsys) -> None:
    assert error in refused(capsys, *MLA, *words)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--workload", "topk", "--block-size", "64"), "--block-size=64: workload topk has no page_size"),
        (("--workload", "dense_decode", "--head-dim", "128"), "--head-dim=128: workload dense_decode has no head_dim"),
        (("--workload", "standard", "--param", "heads=3"), "heads=3: expected a multiple of kv_heads=8"),
        (("--workload", "sparse_prefill", "--param", "context=7"), "context=7: expected at least tokens=2048"),
        (
            ("--workload", "sparse_prefill", "--param", "context=4096", "--param", "overlap=50"),
            "overlap=50: expected context - tokens of at least 2 * topk=4096",
        ),
        (("--workload", "norm_quant", "--param", "width=100"), "width: 100: expected a multiple of 128"),
        (("--workload", "sparse_decode", "--param", "kv=fp4"), "kv='fp4': expected 'packed' or 'bf16'"),
    ],
)
def test_parameters_that_a_workload_cannot_take(words: tuple[str, ...], error: str, capsys) -> None:
    assert error in refused(capsys, "--device", "cpu", *words)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("workload: topk\nquick: {parms: {rows: 1}}", "x.yaml: quick: key 'parms': expected one of workload"),
        ("workload: topk\nruns: [{quick: {batchspecs: []}}]", "runs[0].quick: key 'batchspecs': expected one of"),
        ("workload: topk\nruns: [{repeats: 3}]", "runs[0]: key 'repeats': expected one of"),
        ("workload: topk\nrepeats: many", "repeats='many': expected a valid integer"),
        ("workload: topk\nrepeats: 0", "repeats=0: expected greater than or equal to 1"),
        ("workload: topk\nparams: {rows: four}", "rows='four': expected a valid integer"),
        ("workload: topk\nparams: {rows: [1, four]}", "rows='four': expected a valid integer"),
        ("workload: topk\nparams: [rows]", "params=['rows']: expected a valid dictionary"),
        ("workload: topk\nruns: {a: 1}", "runs={'a': 1}: expected a list"),
        ("workload: topk\ntargets: [{us: {1: 2}}]", "targets[0]: 'by' names the parameter"),
        ("workload: topk\ntargets: [{by: rows, us: {1: fast}}]", "targets[0].us[1]='fast': expected a valid number"),
        ("workload: topk\ntargets: [{note: x}]", "targets[0]: expected 'us' or 'vs_peer'"),
        ("- a list", "expected keys at the top level"),
        ("a: [", "not a YAML file"),
    ],
)
def test_bad_files(text: str, error: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert error in refused(capsys, "--config", str(path), "--device", "cpu")


def test_binary_and_missing_files(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x93")
    assert "not a YAML file" in refused(capsys, "--config", str(tmp_path / "x.yaml"))
    assert "no such file; expected a YAML file, or one of cutlass_mla" in refused(capsys, "--config", "nothing.yaml")


@pytest.mark.parametrize("name", cli.NEEDED)
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))
    error = refused(capsys, *TORCH)
    assert error.startswith(f"benchmarks: error: {name} not found: in the clone, {sys.executable} -m pip install")


def test_a_batch_has_limits() -> None:
    assert len(parse_batch_spec("65536q1s64")) == 65536
    for spec in ("65536q1s64_q1s64", "65536q1k", "q1s20000000"):
        with pytest.raises(ValueError, match="expected at most"):
            parse_batch_spec(spec)


# ---- every workload from the command line


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_every_workload_lists_its_parameters(name: str, capsys) -> None:
    assert code("--workload", name, "--help") == 0
    text = capsys.readouterr().out
    for parameter, field in workloads.WORKLOADS[name].params.model_fields.items():
        assert f"  {parameter}=" in text
        assert field.description
        assert field.description in text
    assert all(backend in text for backend in backends.names(name))
    assert code("--help") == 0
    assert name in capsys.readouterr().out


@pytest.mark.measures
@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_every_workload_can_be_measured_from_the_command_line(name: str, tmp_path: Path, capsys) -> None:
    known = workloads.WORKLOADS[name].params.model_fields
    small = {"tokens": 2, "heads": 2, "kv_heads": 1, "topk": 16, "k": 8, "rows": 2, "context": 70, "batch": 1}
    small |= {"batch_spec": "q1s20", "page_size": 16, "pool_slots": 128, "pool_pages": 4}
    words = [word for key, value in small.items() if key in known for word in ("--param", f"{key}={value}")]
    output = tmp_path / "out.json"
    words += ["--backend", "torch", "--device", "cpu", "--repeats", "1", "--output-json", str(output)]
    assert code("--workload", name, *words) == 0, capsys.readouterr()
    [row] = json.loads(output.read_text())["rows"]
    assert row["status"] == "ok"
    assert {key: row["params"][key] for key in small if key in known} == {k: v for k, v in small.items() if k in known}


@pytest.mark.measures
def test_a_top_k_without_a_page_table_is_timed_and_checked(tmp_path: Path) -> None:
    words = ["--workload", "topk", "--param", "rows=1,3", "--param", "context=70", "--param", "k=8"]
    words += ["--param", "page_table=false,true", "--backend", "torch", "--device", "cpu", "--repeats", "1"]
    assert code(*words, "--output-json", str(tmp_path / "a.json")) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(r["params"]["rows"], r["params"]["page_table"]) for r in rows] == [
        *((1, False), (1, True), (3, False), (3, True))
    ]


# ---- outputs


@pytest.mark.parametrize("option", ["--output-json", "--output-csv", "--plot"])
def test_a_file_that_exists_is_kept(option: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "mine"
    path.write_text("precious")
    assert f"{option}={path}: exists; --force replaces it" in refused(capsys, *TORCH, option, str(path))
    assert path.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    missing = tmp_path / "no" / "such"
    assert "expected a file in a folder that exists" in refused(capsys, *TORCH, option, str(missing))


def test_two_outputs_cannot_be_one_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "x"
    error = refused(capsys, *TORCH, "--output-json", str(path), "--output-csv", os.path.relpath(path))
    assert "--output-json is the same file" in error


def test_a_second_run_into_one_output_is_refused(tmp_path: Path, capsys) -> None:
    with (tmp_path / "a.json.rows.jsonl").open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        assert "another run is writing it" in refused(capsys, *TORCH, "--output-json", str(tmp_path / "a.json"))


@pytest.mark.measures
def test_force_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    assert code(*TORCH, "--output-json", str(path), "--force") == 0
    assert json.loads(path.read_text())["complete"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.measures
def test_what_appears_during_a_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "a.json"
    monkeypatch.setattr(screen, "print_results", lambda *a: path.write_text("precious"))
    assert code(*TORCH, "--output-json", str(path)) == 2
    assert "--force" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert (tmp_path / "a.json.rows.jsonl").exists()  # the rows are kept for the next try
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.rows.jsonl"]


# ---- availability, and whose kernels they are


@pytest.mark.measures
def test_availability_is_asked_before_inputs_are_built(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """An implementation's, a mix's and a peer's, the peer's also for the parameters of the case."""
    for kind in workloads.WORKLOADS.values():
        monkeypatch.setitem(
            workloads.WORKLOADS, kind.name, cli.dataclasses.replace(kind, build=lambda *a: pytest.fail("built"))
        )
    for backend in ("cutlass_mla", "sglang_triton"):
        assert code("--backend", backend, "--batch-specs", "64q1s1k", "--device", "cpu") == 1
    assert code("--workload", "indexer_chain", "--backend", "triton+cuda", "--device", "cpu") == 1
    assert "needs sm_100" in capsys.readouterr().out
    import torch

    from benchmarks import peers

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    reason = peers.unavailable("concat_k", "sglang_jit", {"dtype": "fp8"}, torch.device("cuda"))
    assert reason == "copies 2-byte values only"


def test_own_kernels_are_those_that_live_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {(o.name, n): registry.is_own(o.name, n) for o in operations() for n in o.implementations()}
    for (operation, name), is_own in own.items():
        assert is_own == (name in ("torch", *OWN)), (operation, name)
    assert backends.is_own("triton+cuda", "indexer_chain")
    assert not backends.is_own("torch", "topk")  # the reference is neither
    assert not backends.is_peer("default", "topk")


def test_a_new_kernel_of_ones_own_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in an operation's folder, written in a language; one that calls a library is a peer."""
    folder = Path(registry._OURS) / "ops" / "topk"
    texts = {
        "mine": "import torch\nimport triton\nfrom nsa_backend_plugin.ops import topk\ndef select(): import triton\n",
        "theirs": "import torch\ndef select():\n    import some_library\n",
        "probed": "from nsa_backend_plugin.ops._vendor import probe\ndef available(): probe.missing('some_library')\n",
    }
    files = {folder / f"{name}.py": text for name, text in texts.items()}
    read, exists = Path.read_text, Path.exists
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: files.get(self) or read(self, *a, **k))
    monkeypatch.setattr(Path, "exists", lambda self: self in files or exists(self))
    monkeypatch.setattr(registry, "implementations", lambda operation: list(texts))
    assert registry.is_own.__wrapped__("topk.select", "mine")
    assert not registry.is_own.__wrapped__("topk.select", "theirs")
    assert not registry.is_own.__wrapped__("topk.select", "probed")


# ---- from where it is run


def test_no_module_of_the_suite_is_at_the_top_level() -> None:
    """What could collide with another package's `common` or `report` (only the package's own name is taken)."""
    script = (
        "import sys, benchmarks.cli, benchmarks.run.suite, benchmarks.report.page, benchmarks.engine.steps\n"
        f"print([n for n, m in sys.modules.items() if '.' not in n and n != 'benchmarks' and"
        f" str(getattr(m, '__file__', '')).startswith({str(SUITE)!r})])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=SUITE.parent, check=True)
    assert done.stdout.strip() == "[]"
    sources = [p for p in SUITE.rglob("*.py") if "sys.path" in p.read_text()]
    assert sources == []


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, str(SUITE / "benchmark.py")],
        [sys.executable, "-m", "nsa_backend_plugin.cli", "bench"],
    ],
    ids=["benchmark.py", "nsa-plugin"],
)
def test_the_other_names_of_the_command(command: list[str], tmp_path: Path) -> None:
    """From any folder, with the same options and exit codes, --help included."""
    words = [*TORCH, "--output-json", "a.json"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a.json").read_text())["rows"][0]["backend"] == "torch_cat"
    assert subprocess.run([*command, *words], capture_output=True, cwd=tmp_path).returncode == 2
    shown = subprocess.run([*command, "--workload", "topk", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert "rows=1" in shown.stdout
