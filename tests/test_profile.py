"""`nsa-plugin profile` without a GPU: its arms, its table, and how a layer is cut out of a kernel list."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa_backend_plugin import cli
from nsa_backend_plugin.commands import profile
from nsa_backend_plugin.engine import layer_profile
from tests.processes import HANGS_AFTER, gone, written


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


#: Stands in for `nsa_backend_plugin.engine.layer_profile`: writes down how it was called and what it was asked, does
#: as BEHAVE says: fail or hang while it loads, or at the shape that BEHAVE_AT names.
PROGRAM = """
import json, os, subprocess, sys, time
from collections.abc import Callable
from pathlib import Path
here = Path(os.environ["HERE"])
behave, at = os.environ.get("BEHAVE"), os.environ.get("BEHAVE_AT")
backend = sys.argv[sys.argv.index("--attention-backend") + 1]
def note(name, *what):
    with (here / name).open("a") as file:
        file.write(json.dumps(what) + "\\n")
def answer(row):
    with open(sys.argv[sys.argv.index("--output") + 1], "a") as file:
        text = json.dumps(row) + "\\n"
        for part in text[:20], text[20:]:  # a long line arrives in parts
            file.write(part)
            file.flush()
def do(behave):
    if behave == "fail":
        sys.exit("no such model")
    if behave == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (here / "children").write_text(f"{os.getpid()} {child.pid}\\n")
        time.sleep(600)
note("pids", os.getpid())
note("calls", sys.argv[1:], os.environ.get("NSA_PLUGIN_DUAL_STREAM"))
if not at:
    do(behave)
answer({"cache_tokens": 64})
note("asked", backend, "loaded")
for line in sys.stdin:
    note("asked", backend, line.strip())
    if line.strip() == at:
        do(behave)
    number, colon, context = line.strip().partition(":")
    if not colon:
        spent = [{"name": "gemm", "launches": 40, "us": 991.0}, {"name": "copy", "launches": 1, "us": 9.0}]
        row = {"prompt": int(number), "first_token_ms": 1.5, "kernels": spent}
        if "--no-kernels" in sys.argv:
            del row["kernels"]
        answer(row)
        continue
    row = json.loads((here / "row").read_text())
    row |= {"batch": int(number), "context": int(context)}
    row["step_us"] = 50.0 * len((here / "calls").read_text().splitlines())
    if "--no-kernels" in sys.argv:
        del row["attention"]
    answer(row)
note("asked", backend, "end")
"""


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU and the stand-in; the folder where its calls are written down."""
    (tmp_path / "program.py").write_text(PROGRAM)
    layer = layer_profile.attention_layer(kernels(*LAYER))
    (tmp_path / "row").write_text(json.dumps({"attention": layer}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile, "_PROGRAM", [sys.executable, str(tmp_path / "program.py")])
    monkeypatch.setenv("HERE", str(tmp_path))
    return tmp_path


def calls(folder: Path, name: str = "calls") -> list:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def clock(measured: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The command's: an hour passes at once when a stand-in hangs and `others` have loaded, and no time before."""
    made = SimpleNamespace(others=0)

    def now() -> float:
        loaded = sum(what == "loaded" for _, what in calls(measured, "asked"))
        return 3600.0 * ((measured / "children").exists() and loaded >= made.others)

    monkeypatch.setattr(profile, "time", SimpleNamespace(monotonic=now))
    return made


def run_profile(*arguments: str, model: tuple[str, ...] = ("--model-path=M",)) -> int:
    return cli.main(["profile", "--shapes", "1:64", *arguments, "--", *model])


def test_every_arm_gets_its_own_variables_and_arguments(measured: Path, capsys: pytest.CaptureFixture) -> None:
    arms = ["nsa_plugin NSA_PLUGIN_DUAL_STREAM=0 --page-size=64", "dsa"]
    assert run_profile("--arms", *arms, "--json", str(measured / "rows.json")) == 0
    seen = calls(measured)
    assert [env for _, env in seen] == ["0", None]
    assert seen[0][0][-4:] == ["--attention-backend", "nsa_plugin", "--model-path=M", "--page-size=64"]
    assert seen[1][0][-3:] == ["--attention-backend", "dsa", "--model-path=M"]
    rows = json.loads((measured / "rows.json").read_text())["rows"]
    assert [(row["arm"], row["step_us"]) for row in rows] == list(zip(arms, (50.0, 100.0), strict=True))
    out = capsys.readouterr().out
    assert "stream 7  attend" in out
    assert len([line for line in out.splitlines() if line.split()[:2] == ["1", "64"]]) == 2


def test_an_arm_that_fails_is_named(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("BEHAVE", "fail")
    assert run_profile("--arms", "dsa") == 1
    assert "dsa: exit 1\nno such model" in capsys.readouterr().err


def test_an_arm_without_result_is_ended(
    measured: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("BEHAVE", "hang")
    assert run_profile("--arms", "dsa", "--timeout", "3") == 1
    assert "dsa: no result within 3 s" in capsys.readouterr().err
    assert all(gone(int(pid)) for pid in (measured / "children").read_text().split())


def test_arms_that_are_loaded_together_are_measured_in_turn(measured: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--arms", "nsa_plugin", "dsa", "--together", "--no-kernels", "--prompts", "512"]
    assert run_profile(*words, "--shapes", "1:64", "4:64", "--json", str(measured / "rows.json")) == 0
    asked = calls(measured, "asked")
    assert sorted(asked[:2]) == [["dsa", "loaded"], ["nsa_plugin", "loaded"]]
    points = ["1:64", "4:64", "512"]
    assert asked[2:8] == [[arm, point] for point in points for arm in ("nsa_plugin", "dsa")]
    rows = json.loads((measured / "rows.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["nsa_plugin", "dsa"] * 3
    assert [row.get("batch", row.get("prompt")) for row in rows] == [1, 1, 4, 4, 512, 512]
    assert "attention" not in rows[0]
    out = capsys.readouterr().out
    assert "stream 7" not in out
    assert [line.split() for line in out.splitlines()[-2:]] == [["512", arm, "1.50"] for arm in ("nsa_plugin", "dsa")]


def test_the_kernels_of_a_prompt_are_printed(measured: Path, capsys: pytest.CaptureFixture) -> None:
    """The longest; the file has all."""
    words = ["--arms", "dsa", "--shapes", "1:64", "--prompts", "512", "--json", str(measured / "rows.json")]
    assert run_profile(*words) == 0
    out = capsys.readouterr().out
    assert "dsa prompt 512\n       991.0 us   99%    40 x gemm\n" in out
    assert "copy" not in out
    assert len(json.loads((measured / "rows.json").read_text())["rows"][1]["kernels"]) == 2


def test_arms_are_measured_one_after_the_other(measured: Path) -> None:
    """Two of a real model do not fit a GPU: the second is started when the first has gone."""
    assert run_profile("--arms", "nsa_plugin", "dsa", "--shapes", "1:64", "2:64") == 0
    expected = [[arm, what] for arm in ("nsa_plugin", "dsa") for what in ("loaded", "1:64", "2:64")]
    assert [line for line in calls(measured, "asked") if line[1] != "end"] == expected


@pytest.mark.parametrize("at", ["", "2:64"])
@pytest.mark.parametrize(("behave", "message"), [("fail", "exit 1\nno such model"), ("hang", "no result within 3 s")])
def test_an_arm_that_does_not_answer_leaves_the_others(measured: Path, clock, capsys, at, behave, message) -> None:
    """While it loads, or in the middle: its rows until then are kept, and the others' are whole."""
    clock.others = 2
    bad = f"nsa_plugin BEHAVE={behave} BEHAVE_AT={at}"
    words = ["--arms", "dsa", bad, "fa3", "--together", "--shapes", "1:64", "2:64", "4:64", "--timeout", "3"]
    assert run_profile(*words, "--json", str(measured / "rows.json")) == 1
    rows = json.loads((measured / "rows.json").read_text())["rows"]
    batches = {arm: [row["batch"] for row in rows if row["arm"] == arm] for arm in ("dsa", bad, "fa3")}
    assert batches == {"dsa": [1, 2, 4], bad: [1] if at else [], "fa3": [1, 2, 4]}
    assert f"{bad}: {message}" in capsys.readouterr().err
    if behave == "hang":
        assert all(gone(int(pid)) for pid in (measured / "children").read_text().split())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "arms",
    [["dsa"], ["dsa BEHAVE_AT=1:64", "triton BEHAVE=fail", "fa3 BEHAVE_AT=none"]],
    ids=["alone", "together"],
)
def test_a_signal_ends_what_the_command_started(measured: Path, signum: int, arms: list[str]) -> None:
    """A child that lives on would hold the GPU. Of those that are loaded together one has failed before."""
    command = f"""
import torch
from nsa_backend_plugin import cli
from nsa_backend_plugin.commands import profile
torch.cuda.is_available = lambda: True
profile._PROGRAM = {profile._PROGRAM!r}
raise SystemExit(cli.main(["profile", "--together", "--shapes=1:64", "--arms", *{arms!r}, "--", "--model-path=M"]))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", command],
        env={**os.environ, "BEHAVE": "hang"},
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),
    )
    children = written(measured / "children", 2)
    parent.send_signal(signum)
    assert parent.wait(HANGS_AFTER) in (-signum, 128 + signum)
    pids = [*children, *(pid for (pid,) in calls(measured, "pids"))]
    assert len(pids) == 2 + len(arms)
    assert all(gone(int(pid)) for pid in pids)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arms", "NAME=1"], "--arms 'NAME=1'"),
        (["--shapes", "1x8"], "--shapes 1x8: expected BATCH:CONTEXT"),
        (["--shapes", "1:8", "0:8"], "--shapes 0:8: expected"),
        (["--shapes", "1:"], "--shapes 1:: expected"),
        (["--shapes", "\uff11:8"], "--shapes \uff11:8: expected"),
        (["--shapes=-1:8"], "--shapes -1:8: expected"),
        (["--timeout", "0"], "--timeout 0: expected more than 0"),
        (["--json", "missing/rows.json"], "--json missing/rows.json: the folder missing does not exist"),
        (["--json", "."], "--json .: expected a file"),
    ],
)
def test_bad_arguments_measure_nothing(measured, capsys, arguments, message) -> None:
    assert run_profile(*arguments) == 2
    assert message in capsys.readouterr().err
    assert calls(measured) == []


def test_a_full_disk_names_the_file(measured, capsys) -> None:
    """No file can be longer than this one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        assert run_profile("--arms", "dsa", "fa3", "triton", "--json", str(measured / "rows.json")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    captured = capsys.readouterr()
    assert f"File too large: '{measured / 'rows.json'}'" in captured.err
    assert "attention us" in captured.out, "what was measured is on the screen"
    assert not (measured / "rows.json").exists()


def test_every_arm_needs_a_model(measured, capsys) -> None:
    arms = ["--arms", "dsa --model-path=A", "nsa_plugin --model-path=B"]
    assert run_profile(*arms, model=()) == 0
    assert run_profile(*arms, "fa3", model=("--tp=1",)) == 2
    assert "no --model-path for the arm 'fa3': expected `-- --model-path MODEL`" in capsys.readouterr().err
    assert len(calls(measured)) == 2


def test_a_machine_without_a_gpu_is_refused(measured, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_profile() == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert calls(measured) == []


def test_a_trace_without_kernels_says_so() -> None:
    """`--device cpu` on a machine with a GPU."""
    with pytest.raises(RuntimeError, match="no GPU kernel in the trace"):
        layer_profile.trace_kernels(lambda: None)


@pytest.mark.parametrize("name", ["tp_size", "pp_size"])
def test_more_ranks_than_this_process_are_refused(name) -> None:
    args = SimpleNamespace(tp_size=1, pp_size=1)
    layer_profile.check_one_rank(args)
    setattr(args, name, 8)
    with pytest.raises(SystemExit, match=f"{name} 8: expected 1"):
        layer_profile.check_one_rank(args)


class Model:
    """SGLang's one_batch and its model wrapper in one: a cache of 8 pages of 64 tokens, and what was run in it."""

    def __init__(self, release: str = "0.5.23") -> None:
        self.release = release
        self.ran: list = []
        rows = SimpleNamespace(req_to_token=torch.arange(2048).view(2, 1024))
        self.torch_runner = SimpleNamespace(
            page_size=64,
            device="cpu",
            max_total_num_tokens=512,
            model_config=SimpleNamespace(vocab_size=512, context_len=505),
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 512),
        )
        self.TreeCacheNamespace = SimpleNamespace
        self.SpeculativeAlgorithm = SimpleNamespace(NONE=None)
        batch = SimpleNamespace(prepare_for_extend=lambda: None)
        self.ScheduleBatch = SimpleNamespace(init_new=lambda **_: batch)

    def clear(self) -> None:
        self.ran.append("clear")

    def synchronize(self) -> None:
        self.ran.append("wait")

    def prepare_synthetic_inputs_for_latency_test(self, count: int, length: int, prompts: list | None = None) -> list:
        requests = []
        for i in range(count):
            request = SimpleNamespace(prompt=prompts[i] if prompts else [], prefix_len=0, extend_end=length)
            request.kv = SimpleNamespace()
            if self.release < "0.5.22":
                holder = request if self.release < "0.5.19" else request.kv
                holder.req_pool_idx = 1
                request.prefix_indices = torch.empty(0, dtype=torch.int64)
                request.set_extend_range = lambda start, end, r=request: vars(r).update(range=(start, end))
            requests.append(request)
        return requests

    def decode(self, tokens: torch.Tensor, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
        self.ran.append("step")
        return tokens, torch.zeros(len(tokens), 512)

    def extend(self, requests: list) -> tuple[torch.Tensor, torch.Tensor, None]:
        [request] = requests
        assert len(set(request.prompt)) > 50
        chunk = (request.prefix_len, request.extend_end)
        if self.release < "0.5.22":
            chunk = request.range
            assert request.prefix_indices.tolist() == list(range(1024, 1024 + chunk[0]))
        self.ran.append(chunk)
        return torch.zeros(1), torch.zeros(1, 512), None


@pytest.mark.parametrize("release", ["0.5.17", "0.5.19", "0.5.23"])
@pytest.mark.parametrize(
    ("chunk", "chunks"),
    [
        (200, [(0, 192), (192, 384), (384, 500)]),
        (128, [(0, 128), (128, 256), (256, 384), (384, 500)]),
        (500, [(0, 448), (448, 500)]),
        (8192, [(0, 500)]),
        (-1, [(0, 500)]),
        (None, [(0, 500)]),
    ],
)
def test_a_prompt_is_prefilled_in_chunks_that_end_at_pages(release, chunk, chunks) -> None:
    """Each over the tokens of those before it; the warm-up and five more, each in an emptied cache."""
    model = Model(release)
    row = layer_profile.first_token(model, model, 500, chunk, kernels=False)
    assert model.ran == ["clear", *chunks] * 6
    assert row["first_token_ms"] >= 0
    assert row["logits_finite"]


def test_the_kernels_of_a_prompt_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    traced = [{"name": name, "us": us} for name, us in [("a", 1.0), ("b", 5.0), ("a", 1.5)]]

    def trace(step: Callable[[], None]) -> list[dict]:
        model.ran.clear()
        step()
        return traced

    monkeypatch.setattr(layer_profile, "trace_kernels", trace)
    row = layer_profile.first_token(model, model, 500, 300, kernels=True)
    assert model.ran == ["clear", (0, 256), (256, 500)]
    assert row["kernels"] == [{"name": "b", "launches": 1, "us": 5.0}, {"name": "a", "launches": 2, "us": 2.5}]


def test_steps_are_waited_for_in_groups() -> None:
    model = Model()
    row = layer_profile.measure_shape(model, model, 2, 64, kernels=False)
    assert row.keys() == {"step_us", "logits_finite"}
    groups = [layer_profile.WARMUP_STEPS, *[layer_profile.GROUP_STEPS] * layer_profile.GROUPS]
    assert model.ran == ["clear", *(what for count in groups for what in (*["step"] * count, "wait"))]


def test_each_line_is_answered_and_what_does_not_fit_is_an_error(tmp_path: Path, monkeypatch) -> None:
    """SGLang makes a cache smaller than it was told to where another process holds the GPU's memory."""
    model = Model()
    monkeypatch.setattr(layer_profile, "load", lambda _: (model, model, SimpleNamespace(chunked_prefill_size=128)))
    monkeypatch.setattr(layer_profile, "fill_caches", lambda _: None)
    model.torch_runner.token_to_kv_pool = None
    lines = ["2:64\n", "3:64\n", "100\n", "513\n", "510\n", "200\n"]
    layer_profile.serve(lines, [], tmp_path / "rows", kernels=False)
    loaded, *rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert loaded == {"cache_tokens": 512}
    tokens = 64 + layer_profile.DECODED_TOKENS
    assert [row.get("error") for row in rows] == [
        None,
        repr(ValueError(f"3 x {tokens} tokens: expected at most 512 in pages of 64")),
        None,
        repr(ValueError("1 x 513 tokens: expected at most 512 in pages of 64")),
        repr(ValueError("sequences of 510 tokens: expected at most 505")),
        None,
    ]
    assert [row["prompt"] for row in rows[2:] if "first_token_ms" in row] == [100, 200]
