"""The grid beside stock without a GPU: its points, the command that measures them, its table and file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.engine import grid
from benchmarks.engine.measure import profiled_tokens
from benchmarks.run import environment
from nsa_backend_plugin.engine.layer_profile import DECODED_TOKENS

from .conftest import code

WORDS = ["--batches", "1", "16", "64", "--contexts", "1024", "32768", "--most-tokens", "600000"]
POINTS = [(1, 1024), (16, 1024), (64, 1024), (1, 32768), (16, 32768)]


def test_points_with_too_many_tokens_are_left_out() -> None:
    assert grid.points(grid.parser().parse_args(WORDS)) == POINTS
    whole = grid.points(grid.parser().parse_args([]))
    assert len(whole) == 17
    assert (128, 32768) not in whole


def value(words: list[str], name: str) -> int:
    [found] = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return int(found)


@pytest.mark.parametrize("prompts", [[], [1024, 700_000]])
def test_the_cache_holds_the_largest_point_while_it_grows(prompts: list[int], tmp_path: Path) -> None:
    options = grid.parser().parse_args([*WORDS, "--prompts", *map(str, prompts), "--arms", "nsa_plugin", "dsa"])
    words = grid.command(tmp_path, tmp_path / "rows", POINTS, options)
    assert {"--together", "--no-kernels"} <= set(words)
    shapes = words[words.index("--shapes") + 1 : words.index("--prompts")]
    assert shapes == [f"{batch}:{context}" for batch, context in POINTS]
    tokens = value(words, "max-total-tokens")
    assert tokens >= 16 * (32768 + DECODED_TOKENS)
    assert tokens >= max(prompts, default=0)
    assert value(words, "max-running-requests") >= 64
    assert words[words.index("--cuda-graph-bs-decode") + 1 :] == ["1", "16", "64"]
    assert ("--cuda-graph-backend-prefill=disabled" in words) == (not prompts), "graphs that a server would have"
    assert all(profiled_tokens(c) >= c + DECODED_TOKENS and profiled_tokens(c) % 128 == 0 for c in (1, 128, 1000))


#: Stands in for `nsa-plugin profile`.
PROFILE = """
import json, sys
from pathlib import Path
rows = [
    {"arm": arm, "batch": 64, "context": 8192, "step_us": us} for arm, us in (("nsa_plugin", 1000.0), ("dsa", 1300.0))
]
rows += [{"arm": "nsa_plugin", "batch": 128, "context": 8192, "step_us": 2000.0}]
rows += [{"arm": "dsa", "batch": 128, "context": 8192, "error": "ValueError('128 x 8327 tokens')"}]
rows += [{"arm": "nsa_plugin", "prompt": 1024, "first_token_ms": 20.0}]
Path(sys.argv[1]).write_text(json.dumps({"rows": rows}))
sys.exit(1)
"""


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "write_model", lambda folder, *_: folder)
    monkeypatch.setattr(grid, "command", lambda model, profile, *_: [sys.executable, "-c", PROFILE, str(profile)])


def test_every_head_count_has_a_file_and_a_table(measured, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Times over the first arm's; what an arm could not measure has no number."""
    assert code("grid", "--heads", "16", "128", f"--out={tmp_path}") == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for expected in (
        ["nsa_plugin", "dsa", "x"],
        ["64", "1000.0", "1300.0", "1.300"],
        ["128", "2000.0", "error"],
        ["1024", "20.0"],
    ):
        assert lines.count(expected) == 2
    for heads in (16, 128):
        path = tmp_path / f"grid-v32-fp8_e4m3-h{heads}-{environment.machine('cpu')}.json"
        body = json.loads(path.read_text())
        assert body["options"]["heads"] == heads
        assert body["options"]["arms"] == ["nsa_plugin", "dsa"]
        assert len(body["rows"]) == 5
        assert {"device", "libraries", "date", "command"} <= set(body["environment"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--most-tokens", "1000"], "--most-tokens=1000: expected"),
        (["--arms", "A=1"], "--arms 'A=1'"),
        (["--heads", "128", "16"], "--force replaces it"),
        (["--batches", "0"], "'0': expected a whole number"),
    ],
)
def test_what_is_refused_measures_nothing(words, message, tmp_path: Path, capsys, monkeypatch) -> None:
    """Also where the file of the last head count alone exists."""
    monkeypatch.setattr(grid, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / f"grid-v32-fp8_e4m3-h16-{environment.machine('cpu')}.json").write_text("precious")
    assert code("grid", f"--out={tmp_path}", *words) == 2
    assert message in capsys.readouterr().err
