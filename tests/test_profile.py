"""`nsa-plugin profile` without a GPU: its arms, its table, and how a layer is cut out of a kernel list."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nsa_backend_plugin import cli
from nsa_backend_plugin.commands import profile
from nsa_backend_plugin.engine import layer_profile


def kernels(*names: str) -> list[dict]:
    """One after another, 4 us each, short ones 1 us."""
    times = [1.0 if name.startswith("short") else 4.0 for name in names]
    starts = [sum(times[:i]) for i in range(len(times))]
    return [{"name": n, "start_us": s, "us": t, "stream": 7} for n, s, t in zip(names, starts, times, strict=True)]


LAYER = ("FusedAddRMSNorm", "gemm", "short_rope", "mqa_logits", "attend", "FusedAddRMSNorm", "gemm", "silu")


def test_layer_is_what_lies_between_two_norms_and_attends() -> None:
    layer = layer_profile.attention_layer(kernels("embedding", *LAYER, *LAYER, *LAYER, "FusedAddRMSNorm"))
    assert [k["name"] for k in layer["kernels"]] == list(LAYER[:5])
    assert layer["kernels"][0]["start_us"] == 0
    assert (layer["span_us"], layer["launches"]) == (17.0, 5)
    assert (layer["short_launches"], layer["short_us"]) == (1, 1.0)


def test_a_trace_without_attention_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no attention kernel"):
        layer_profile.attention_layer(kernels("FusedAddRMSNorm", "gemm", "FusedAddRMSNorm"))


def run_profile(*arguments: str) -> int:
    return cli.main(["profile", "--shapes", "1:64", *arguments, "--", "--model-path=M"])


def test_every_arm_gets_its_own_variables_and_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        seen.append((command, env.get("NSA_PLUGIN_DUAL_STREAM")))
        layer = layer_profile.attention_layer(kernels(*LAYER))
        row = {"batch": 1, "context": 64, "step_us": 50.0 * len(seen), "attention": layer}
        Path(command[command.index("--output") + 1]).write_text(json.dumps(row) + "\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(profile.subprocess, "run", run)
    arms = ["nsa_plugin NSA_PLUGIN_DUAL_STREAM=0 --page-size=64", "dsa"]
    assert run_profile("--arms", *arms, "--json", str(tmp_path / "rows.json")) == 0
    assert [env for _, env in seen] == ["0", None]
    assert seen[0][0][-4:] == ["--attention-backend", "nsa_plugin", "--model-path=M", "--page-size=64"]
    assert seen[1][0][-3:] == ["--attention-backend", "dsa", "--model-path=M"]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["arm"], row["step_us"]) for row in rows] == list(zip(arms, (50.0, 100.0), strict=True))
    out = capsys.readouterr().out
    assert "stream 7  attend" in out
    assert len([line for line in out.splitlines() if line.split()[:2] == ["1", "64"]]) == 2


def test_an_arm_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    failed = subprocess.CompletedProcess([], 3, "", "no such model")
    monkeypatch.setattr(profile.subprocess, "run", lambda *_, **__: failed)
    assert run_profile("--arms", "dsa") == 1
    assert "dsa: exit 3\nno such model" in capsys.readouterr().err


def test_a_bad_arm_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert run_profile("--arms", "NAME=1") == 2
    assert "--arms 'NAME=1'" in capsys.readouterr().err
