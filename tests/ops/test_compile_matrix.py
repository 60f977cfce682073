"""Every kernel in every configuration of the tuning tables compiles: Triton without spills, TileLang to HIP source."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import random
import re
import subprocess
import sys

import pytest

from nsa_backend_plugin import settings
from tools import compile_matrix, compile_table, compile_tilelang, try_tritons

ROOT = pathlib.Path(__file__).resolve().parents[2]
#: Compiled by each run, some random cases of one target of each vendor and of a third. All cases of all targets take a
#: quarter of an hour: the table has them, each with a fingerprint of what it was compiled from.
SAMPLED = ("sm_90", "gfx942")
#: Interpreted kernels, as in this process, have nothing to compile. A GPU host finds its libraries by PYTHONPATH.
PATH = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
COMPILE = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": PATH}

DOCS = ROOT / "docs"
TABLE, TILELANG_TABLE = DOCS / "compile_table.csv", DOCS / "tilelang_table.csv"
#: Kernels with a matrix product -> the instruction that it must become. Attention with fp8 rows multiplies in bf16.
FP8_LOGITS, ATTENTION = ("mqa_logits.paged", "mqa_logits.ragged"), ("sparse_mla.", "dense_mla.")
PROJECTION = r"tcgen05\.mma\.kind::\w+|(wgmma\.mma_async|mma\.sync)\.m\d+n\d+k(16|32)"
INSTRUCTIONS = {
    "gfx942": (r"v_mfma_f32_\w+_fp8_fp8", r"v_mfma_f32_\w+_b?f16"),
    "gfx950": (r"v_mfma_f32_\w+_f8f6f4", r"v_mfma_f32_\w+_b?f16"),
    "sm_90": (r"wgmma\.mma_async\.m64n\d+k32", r"(wgmma\.mma_async|mma\.sync)\.m\d+n\d+k16"),
    "sm_100": (r"tcgen05\.mma\.kind::f8f6f4", r"mma\.sync\.m16n8k16"),
}
#: Bytes a lane of the kernels that `compile_cases.MAY_SPILL` allows some.
SPILLS = {
    ("sm_90", "sparse_mla.union"): 16,
    ("sm_90", "mqa_logits.paged"): 64,
    ("gfx1201", "mqa_logits.paged"): 48,
    ("sm_120", "mqa_logits.paged"): 8,
}

SPILLING_KERNEL = """
import triton, triton.language as tl
from tools.compile_cases import CompileCase
from tools.compile_matrix import compile_case

@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    x = tl.load(x_ptr + offset)
    tl.store(x_ptr + offset, x - tl.max(x))

# AMD lanes have 512 registers; asking for 8 waves per SIMD leaves 64 of them.
for target, too_large, options in (("sm_90", 16384, {}), ("gfx942", 8192, {"waves_per_eu": 8})):
    for size, resident in ((too_large, 1), (256, 1), (256, 65)):
        options = {"num_warps": 1, **options}
        case = CompileCase("case", kernel, {"x_ptr": "*fp32"}, {"N": size}, options=options, resident=resident)
        print(compile_case(target, "test", case).problem)
"""


def test_the_table_is_of_the_present_kernels_and_a_sample_compiles_as_it_says(tmp_path):
    third = random.choice([target for target in compile_matrix.ALL_TARGETS if target not in SAMPLED])
    for target, cases in (*((t, 5) for t in SAMPLED), (third, 4)):
        command = [sys.executable, "-m", "tools.compile_matrix", "--targets", target, "--sample", str(cases)]
        finished = subprocess.run([*command, "--check-table", str(TABLE)], capture_output=True, text=True, env=COMPILE)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert f"{cases} kernels compiled, 0 with problems" in finished.stdout
    others = [target for target in compile_matrix.ALL_TARGETS if target not in (*SAMPLED, third)]
    command = [sys.executable, "-m", "tools.compile_matrix", "--targets", *others, "--sample", "0"]
    finished = subprocess.run([*command, "--check-table", str(TABLE)], capture_output=True, text=True, env=COMPILE)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_what_the_table_says_of_every_case():
    rows = list(csv.DictReader(TABLE.read_text().splitlines()))
    assert {row["target"] for row in rows} == set(compile_matrix.ALL_TARGETS)
    operations = {op for op in settings.OPERATIONS if "triton" in compile_matrix.implementation_names(op)}
    for target in SAMPLED:
        assert {row["kernel"].split(".")[0] for row in rows if row["target"] == target} == operations
    for row in rows:
        assert int(row["registers"]) > 0, row
        assert int(row["spill_bytes"]) <= SPILLS.get((row["target"], row["kernel"].split()[0]), 0), row
        assert int(row["shared_bytes"]) <= compile_matrix.hardware(row["target"]).shared_per_program, row
        assert 0 < float(row["occupancy"]) <= 1, row
        if row["target"] not in INSTRUCTIONS:
            continue
        kernel, found = row["kernel"], row["matrix_instructions"].split()
        logits, attention = INSTRUCTIONS[row["target"]]
        expected = logits if kernel.startswith(FP8_LOGITS) else attention if kernel.startswith(ATTENTION) else None
        if kernel.startswith("projection."):  # of fp8 blocks or bf16, by the case
            expected = f"{logits}|{attention}|{PROJECTION}"
        if expected is None or kernel.endswith((".combine_kernel", "._fill_outside_kernel")):
            assert found == [], row
        else:
            assert found, row
            assert all(re.fullmatch(expected, name) for name in found), row


FINGERPRINT = """
import triton, triton.language as tl
from tools.compile_cases import CompileCase
from tools.compile_matrix import fingerprint

SCALE = tl.constexpr(2)
@triton.jit
def scaled(x):
    return x * SCALE
@triton.jit
def kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), scaled(tl.load(x_ptr + tl.arange(0, N))))

print(fingerprint(CompileCase("case", kernel, {"x_ptr": "*fp32"}, {"N": 16}, options={"num_warps": 1})))
"""


def test_a_fingerprint_is_of_all_that_is_compiled(tmp_path):
    """The kernel, what it calls, the constants these name, and the configuration; not where they stand in a file."""

    changes = (
        ("x * SCALE", "x + SCALE"),
        ("constexpr(2)", "constexpr(3)"),
        ('"N": 16', '"N": 32'),
        ('"num_warps": 1', '"num_warps": 2'),
    )
    texts = [FINGERPRINT, f"# moved\n\n{FINGERPRINT}", *(FINGERPRINT.replace(*change) for change in changes)]
    scripts = [tmp_path / f"kernels{number}.py" for number in range(len(texts))]
    for script, text in zip(scripts, texts, strict=True):
        script.write_text(text)
    command = [sys.executable, "-c", "import runpy, sys; [runpy.run_path(script) for script in sys.argv[1:]]", *scripts]
    done = subprocess.run(command, capture_output=True, text=True, env=COMPILE, check=True)
    first, moved, *changed = done.stdout.split()
    assert moved == first
    assert len({first, *changed}) == 5


def test_newer_tritons_were_tried_and_spill_only_where_it_is_known():
    """`make test-tritons` says so; it takes longer than all of these."""
    record = json.loads(try_tritons.RECORD.read_text())
    assert {entry["triton"] for entry in record} == set(try_tritons.KNOWN)
    for entry in record:
        assert entry["compiled"] > 0
        assert set(entry["problems"]) <= try_tritons.KNOWN[entry["triton"]]


def test_spills_are_found_and_grids_of_more_programs_than_a_core_holds(tmp_path):
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING_KERNEL)
    output = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=COMPILE, check=True)
    cuda_big, cuda_small, cuda_many, amd_big, amd_small, amd_many = output.stdout.split("\n")[:6]
    assert "spills" in cuda_big
    assert "spills" in amd_big
    assert cuda_small == amd_small == ""
    assert re.fullmatch(r"a core holds \d+ programs, the grid counts on 65", cuda_many)
    assert re.fullmatch(r"a core holds \d+ programs, the grid counts on 65", amd_many)


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
    old = compile_matrix.Result("sm_90", "concat", "a", 4, 3, 32, 0, 0, (), 1.0, "of a")
    other = dataclasses.replace(old, op="topk", case="b, with a comma", source="of b")
    sources = {("sm_90", "concat.a"): "of a", ("sm_90", "topk.b, with a comma"): "of b"}
    both = (["sm_90"], ["concat", "topk"], sources)
    concat = (["sm_90"], ["concat"], {("sm_90", "concat.a"): "of a"})
    compile_table.write(path, [old, other], *both)
    assert compile_table.sources(path) == sources
    assert compile_table.differences(path, [old, other], *both) == []
    assert compile_table.differences(path, [old], *concat) == [], "only what was asked for is compared"
    few_more = dataclasses.replace(old, registers=32 + compile_table.REGISTER_SLACK, occupancy=0.5)
    assert compile_table.differences(path, [few_more], *concat) == [], "LLVM's own variation"
    for change in ({"spill_bytes": 4}, {"shared_bytes": 16}, {"warps": 8}, {"matrix_instructions": ("wgmma",)}):
        assert len(compile_table.differences(path, [dataclasses.replace(old, **change)], *concat)) == 2
    changed = dataclasses.replace(old, registers=41)
    minus, plus = compile_table.differences(path, [changed], *concat)
    assert (minus, plus) == (
        "- sm_90 | concat.a | 4 | 3 | 32 | 0 | 0 | 1.000 |  | of a",
        "+ sm_90 | concat.a | 4 | 3 | 41 | 0 | 0 | 1.000 |  | of a",
    )
    assert compile_table.differences(path, [old], *both) == [], "not compiled, but there, and of this source"
    for key in (("sm_90", "topk.b, with a comma"), ("sm_90", "topk.c")):
        [stale] = compile_table.differences(path, [old], *both[:2], {**sources, key: "of another"})
        assert stale == f"+ {' | '.join(key)}: of another source, or new"
    [gone] = compile_table.differences(path, [old], *both[:2], concat[2])
    assert gone.startswith("- sm_90 | topk.b, with a comma")
    compile_table.write(path, [changed], *concat)
    assert compile_table.differences(path, [changed, other], *both) == []
    compile_table.write(path, [], ["sm_90"], ["topk"], {})
    assert compile_table.differences(path, [changed], *both[:2], concat[2]) == [], "what is no case has no row"


def test_only_what_has_changed_is_compiled_for_the_table(tmp_path):
    table = tmp_path / "table.csv"
    command = [sys.executable, "-m", "tools.compile_matrix", "--targets", "sm_90", "--ops", "concat"]

    def write() -> str:
        done = subprocess.run([*command, "--write-table", str(table)], capture_output=True, text=True, env=COMPILE)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()[-1]

    count = int(write().split()[0])
    assert count > 1
    assert write() == "0 kernels compiled, 0 with problems"
    written = table.read_text()
    head, first, *rest = written.splitlines(keepends=True)
    table.write_text("".join([head, first.rpartition(",")[0] + ",of another\n", *rest]))
    assert write() == "1 kernels compiled, 0 with problems"
    assert table.read_text() == written


def test_tilelang_kernels_lower_as_in_the_table(tmp_path, monkeypatch):
    """Some random ones of one target in each run."""
    pytest.importorskip("tilelang", reason="TileLang is not installed")
    sources, table = tmp_path / "sources", tmp_path / "table.csv"
    target = random.choice(compile_tilelang.DEFAULT_TARGETS)
    whole = [row for row in csv.DictReader(TILELANG_TABLE.read_text().splitlines()) if row["target"] == target]
    cases = list(compile_tilelang.cases(target))
    assert [row["kernel"] for row in whole] == [case.name for case in cases]
    chosen = sorted(random.sample(range(len(cases)), 5))  # three of them, if not more, attend
    monkeypatch.setattr(compile_tilelang, "cases", lambda arch: [cases[number] for number in chosen])
    assert compile_tilelang.main(["--targets", target, "--sources", str(sources), "--write-table", str(table)]) == 0
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert rows == [whole[number] for number in chosen], "--write-table docs/tilelang_table.csv renews it"
    for source in sources.glob("*attend*"):
        text = source.read_text()
        assert "buf_dyn_shmem" in text
        # A plain copy of a row makes each thread wait for its loads one by one (docs/tilelang.md).
        assert "cp_async_gs_conditional<16>" in text if target == "sm_90" else "mfma_f32_16x16x16bf16_1k" in text
    assert len(list(sources.iterdir())) == len(rows)


def test_a_tilelang_kernel_that_does_not_fit_is_reported(monkeypatch, capsys):
    pytest.importorskip("tilelang", reason="TileLang is not installed")
    small = dataclasses.replace(compile_matrix.hardware("gfx942"), shared_per_program=32 * 1024)
    monkeypatch.setattr(compile_tilelang, "hardware", lambda arch: small)
    cases = compile_tilelang.cases
    monkeypatch.setattr(compile_tilelang, "cases", lambda arch: list(cases(arch))[:1])
    assert compile_tilelang.main(["--targets", "gfx942"]) == 1
    assert "needs 58560 bytes of shared memory, gfx942 has 32768" in capsys.readouterr().out
