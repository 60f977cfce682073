"""Every kernel in every configuration of the tuning tables compiles: Triton without spills, TileLang to HIP source."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from nsa_backend_plugin import settings
from tools import compile_matrix, compile_table, compile_tilelang, try_tritons

ROOT = pathlib.Path(__file__).resolve().parents[2]
#: Compiled in every case by each run, one of each vendor; of the other targets the first case of each kernel.
#: All cases of all targets take a quarter of an hour: `tools.compile_matrix --targets all`.
WHOLE = ("sm_90", "gfx942")
#: Interpreted kernels, as in this process, have nothing to compile.
COMPILE = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}

DOCS = ROOT / "docs"
TABLE, TILELANG_TABLE = DOCS / "compile_table.csv", DOCS / "tilelang_table.csv"
#: Kernels with a matrix product -> the instruction that it must become. Attention with fp8 rows multiplies in bf16.
FP8_LOGITS, ATTENTION = ("mqa_logits.paged", "mqa_logits.ragged"), ("sparse_mla.", "dense_mla.")
INSTRUCTIONS = {
    "gfx942": (r"v_mfma_f32_\w+_fp8_fp8", r"v_mfma_f32_\w+_bf16"),
    "gfx950": (r"v_mfma_f32_\w+_f8f6f4", r"v_mfma_f32_\w+_bf16"),
    "sm_90": (r"wgmma\.mma_async\.m64n\d+k32", r"(wgmma\.mma_async|mma\.sync)\.m\d+n\d+k16"),
    "sm_100": (r"tcgen05\.mma\.kind::f8f6f4", r"mma\.sync\.m16n8k16"),
}

SPILLING_KERNEL = """
import triton, triton.language as tl
from tools.compile_matrix import compile_case
from nsa_backend_plugin.ops._triton.support import CompileCase

@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    x = tl.load(x_ptr + offset)
    tl.store(x_ptr + offset, x - tl.max(x))

# AMD lanes have 512 registers; asking for 8 waves per SIMD leaves 64 of them.
for target, too_large, options in (("sm_90", 16384, {}), ("gfx942", 8192, {"waves_per_eu": 8})):
    for size in (too_large, 256):
        case = CompileCase("case", kernel, {"x_ptr": "*fp32"}, {"N": size}, num_warps=1, options=options)
        print(compile_case(target, "test", case).problem)
"""


@pytest.mark.parametrize("target", WHOLE)
def test_all_kernels_compile_without_spills_as_in_the_table(target, tmp_path):
    report = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "tools.compile_matrix",
        "--targets",
        target,
        "--json",
        str(report),
        "--check-table",
        str(TABLE),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, env=COMPILE)
    print(finished.stdout)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    results = json.loads(report.read_text())
    operations = {op for op in settings.OPERATIONS if "triton" in compile_matrix.implementation_names(op)}
    assert {r["op"] for r in results} == operations
    limit = compile_matrix.hardware(target).shared_per_program
    for result in results:
        assert result["registers"] > 0
        assert result["spill_bytes"] == 0
        assert result["shared_bytes"] <= limit
        assert 0 < result["occupancy"] <= 1
        kernel, found = f"{result['op']}.{result['case']}", result["matrix_instructions"]
        logits, attention = INSTRUCTIONS[target]
        expected = logits if kernel.startswith(FP8_LOGITS) else attention if kernel.startswith(ATTENTION) else None
        if expected is None or ".combine" in kernel:
            assert found == [], kernel
        else:
            assert found, kernel
            assert all(re.fullmatch(expected, name) for name in found), (kernel, found)


def test_other_targets_compile_a_case_of_each_kernel_and_have_the_rest_in_the_table():
    others = [target for target in compile_matrix.ALL_TARGETS if target not in WHOLE]
    command = [sys.executable, "-m", "tools.compile_matrix", "--targets", *others, "--sample"]
    finished = subprocess.run([*command, "--check-table", str(TABLE)], capture_output=True, text=True, env=COMPILE)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("0 with problems") == len(others)


def test_nothing_in_the_table_spills_or_exceeds_its_targets_memory():
    rows = list(csv.DictReader(TABLE.read_text().splitlines()))
    assert {row["target"] for row in rows} == set(compile_matrix.ALL_TARGETS)
    for row in rows:
        assert int(row["spill_bytes"]) == 0, row
        assert int(row["shared_bytes"]) <= compile_matrix.hardware(row["target"]).shared_per_program, row


def test_newer_tritons_were_tried_and_spill_only_where_it_is_known():
    """`make test-tritons` says so; it takes longer than all of these."""
    record = json.loads(try_tritons.RECORD.read_text())
    assert {entry["triton"] for entry in record} == set(try_tritons.KNOWN)
    for entry in record:
        assert entry["compiled"] > 0
        assert set(entry["problems"]) <= try_tritons.KNOWN[entry["triton"]]


def test_spills_are_found(tmp_path):
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING_KERNEL)
    output = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=COMPILE, check=True)
    cuda_big, cuda_small, amd_big, amd_small = output.stdout.split("\n")[:4]
    assert "spills" in cuda_big
    assert "spills" in amd_big
    assert cuda_small == amd_small == ""


def test_interpreted_kernels_are_refused():
    command = [sys.executable, "-m", "tools.compile_matrix", "--ops", "concat"]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert finished.returncode == 2
    assert "TRITON_INTERPRET" in finished.stderr


@pytest.mark.parametrize(
    "arch, registers, shared, warps, expected",
    [
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_90", 128, 0, 4, 0.25),
        ("sm_90", 32, 100 * 1024, 4, 8 / 64),
        ("gfx942", 64, 0, 4, 1.0),
        ("gfx942", 65, 0, 4, 7 / 8),
        ("gfx942", 512, 0, 4, 1 / 8),
        ("gfx950", 64, 80 * 1024, 8, 0.5),
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert compile_matrix.occupancy(arch, registers, shared, warps) == expected


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="rdna"):
        compile_matrix.gpu_target("rdna")
    assert compile_matrix.gpu_target("gfx1201").warp_size == 32
    assert compile_matrix.gpu_target("gfx942").warp_size == 64


def test_reports_are_written_where_asked(tmp_path):
    report = pathlib.Path(tmp_path / "concat.json")
    command = [sys.executable, "-m", "tools.compile_matrix", "--targets", "sm_90", "--ops", "concat"]
    subprocess.run([*command, "--json", str(report)], check=True, capture_output=True, env=COMPILE)
    assert {(r["target"], r["op"]) for r in json.loads(report.read_text())} == {("sm_90", "concat")}


def test_a_changed_kernel_shows_in_the_table(tmp_path):
    path = tmp_path / "table.csv"
    old = compile_matrix.Result("sm_90", "concat", "a", 4, 3, 32, 0, 0, (), 1.0)
    other = dataclasses.replace(old, op="topk", case="b, with a comma")
    both, concat = (["sm_90"], ["concat", "topk"]), (["sm_90"], ["concat"])
    compile_table.write(path, [old, other], *both)
    assert compile_table.differences(path, [old, other], *both) == []
    assert compile_table.differences(path, [old], *concat) == [], "only what was compiled is compared"
    few_more = dataclasses.replace(old, registers=32 + compile_table.REGISTER_SLACK, occupancy=0.5)
    assert compile_table.differences(path, [few_more], *concat) == [], "LLVM's own variation"
    for change in ({"spill_bytes": 4}, {"shared_bytes": 16}, {"warps": 8}, {"matrix_instructions": ("wgmma",)}):
        assert len(compile_table.differences(path, [dataclasses.replace(old, **change)], *concat)) == 2
    changed = dataclasses.replace(old, registers=41)
    minus, plus = compile_table.differences(path, [changed], *concat)
    assert (minus, plus) == (
        "- sm_90 | concat.a | 4 | 3 | 32 | 0 | 0 | 1.000 | ",
        "+ sm_90 | concat.a | 4 | 3 | 41 | 0 | 0 | 1.000 | ",
    )
    [gone] = compile_table.differences(path, [old], *both)
    assert gone.startswith("- sm_90 | topk.b, with a comma")
    listed = {("sm_90", "concat.a"), ("sm_90", "topk.b, with a comma")}
    assert compile_table.differences(path, [old], *both, listed) == [], "not compiled, but there"
    assert compile_table.differences(path, [old], *both, {*listed, ("sm_90", "topk.c")}) == ["+ sm_90 | topk.c"]
    compile_table.write(path, [changed], *concat)
    assert compile_table.differences(path, [changed, other], *both) == []
    compile_table.write(path, [], ["sm_90"], ["topk"])
    assert compile_table.differences(path, [changed], *both) == [], "a kernel that declines a target has no rows there"


def test_tilelang_kernels_lower_for_amd_as_in_the_table(tmp_path):
    pytest.importorskip("tilelang", reason="TileLang is not installed")
    sources, table = tmp_path / "sources", tmp_path / "table.csv"
    command = [sys.executable, "-m", "tools.compile_tilelang"]
    finished = subprocess.run(
        [*command, "--sources", str(sources), "--write-table", str(table)], capture_output=True, text=True, env=COMPILE
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert table.read_text() == TILELANG_TABLE.read_text(), "--write-table docs/tilelang_table.csv renews it"
    for source in sources.glob("*attend*"):
        text = source.read_text()
        assert "__builtin_amdgcn_mfma_f32_16x16x16bf16_1k" in text
        assert "buf_dyn_shmem" in text
    assert len(list(sources.iterdir())) == len(table.read_text().splitlines()) - 1


def test_a_tilelang_kernel_that_does_not_fit_is_reported(monkeypatch, capsys):
    pytest.importorskip("tilelang", reason="TileLang is not installed")
    small = dataclasses.replace(compile_matrix.hardware("gfx942"), shared_per_program=32 * 1024)
    monkeypatch.setattr(compile_tilelang, "hardware", lambda arch: small)
    cases = compile_tilelang.cases
    monkeypatch.setattr(compile_tilelang, "cases", lambda arch: list(cases(arch))[:1])
    assert compile_tilelang.main(["--targets", "gfx942"]) == 1
    assert "needs 57472 bytes of shared memory, gfx942 has 32768" in capsys.readouterr().out
