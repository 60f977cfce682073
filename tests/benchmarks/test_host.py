"""What the host spends on a call: every function of a served layer has a row, and nothing is left changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.engine import host
from nsa_backend_plugin.runtime import served

from .conftest import code

FEW = ("--calls=3", "--rounds=2")


@pytest.mark.parametrize("arch", ["cpu", "sm_90", "gfx942"])
def test_every_function_of_a_layer_has_a_row(arch: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also for a machine that is not here: then nothing is launched."""
    model = next(iter(served.examples(arch).values()))
    steps = host.CPU_STEPS if arch == "cpu" else host.STEPS
    said = [(title, o.name, o.explain(c).chosen) for title, s in steps.items() for o, c in served.calls(model, s, arch)]
    assert cli.main(["host", f"--arch={arch}", f"--out={tmp_path}", *FEW]) == 0
    [path] = tmp_path.glob("host-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["step"], row["function"], row["implementation"]) for row in rows] == said
    for row in rows:
        assert {"launch", "whole"} <= row.keys() if arch == "cpu" else "launch" not in row
        assert all(row[column] > 0 for column in host.COLUMNS if column in row)
    text = capsys.readouterr().out
    assert all(f"{name} ({chosen})" in text for _, name, chosen in said)
    after = [(o.name, o.explain(c).chosen) for s in steps.values() for o, c in served.calls(model, s, arch)]
    assert after == [(name, chosen) for _, name, chosen in said]


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, error in (
        (["--calls=0"], "--calls=0: expected at least 1"),
        (["--model=GPT"], "--model='GPT': expected one of DeepSeek-V3.2, 16 heads"),
    ):
        assert code("host", f"--out={tmp_path}", *words) == 2
        assert error in capsys.readouterr().err
