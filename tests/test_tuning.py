"""The tuning tools still call the kernels as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nsa_backend_plugin.ops import projection
from nsa_backend_plugin.ops.projection import cuda, wgmma
from tools import tune_projection

ROOT = Path(__file__).parents[1]


def test_mla_tiles_are_tried_and_right(tmp_path: Path) -> None:
    """Minimal shapes, on a CPU in Triton's interpreter; every configuration is compared with the reference."""
    out = tmp_path / "tune.json"
    command = [sys.executable, "-m", "tools.tune_mla", "--tiny", f"--out={out}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert {row["shape"].split()[0] for row in rows} == {"sparse_decode", "dense_decode"}
    assert all("problem" not in row and row["us"] > 0 for row in rows)


def test_sharing_rows_is_tried_and_right(tmp_path: Path) -> None:
    """As above; today's way, nothing shared, all shared."""
    out = tmp_path / "tune.json"
    command = [sys.executable, "-m", "tools.tune_union", "--tiny", "--heads", "8", f"--out={out}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3
    assert all("problem" not in row and row["us"] > 0 for row in rows)


@pytest.mark.parametrize("name", tune_projection.NAMES)
def test_projection_variants_are_of_the_call_that_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[cuda._Sizes] = []
    for operation in (projection.linear, projection.per_head):
        monkeypatch.setattr(operation, "run", lambda call: asked.append(cuda._sizes_of(call)))
    problem = tune_projection.problem_of(name, 1, 16, torch.device("cpu"))
    problem.run(None, problem.inputs[0], False)
    sizes = tune_projection.sizes_of(problem)
    assert asked == [sizes]

    today = {
        "cuda": cuda._variants("sm_90", sizes, 132)[0],
        "wgmma": wgmma._variants(sizes, 132)[0],
    }
    for impl, how in tune_projection.IMPLEMENTATIONS.items():
        if name not in how.names:
            continue
        found = list(how.variants(sizes, 1, "sm_90", 132))
        assert found[0] == today[impl]
        assert len(set(found)) == len(found) > 5
        assert all(v.cluster * v.share >= sizes.blocks and v.shared_bytes <= 227 << 10 for v in found)
