"""The engine measurements without a GPU: model folders, the server's log lines, the table."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import cli
from benchmarks.engine import measure as engine_h200
from benchmarks.engine import output
from benchmarks.engine import steps as run_engine
from benchmarks.engine.model import FAMILIES, config, weights, write_config
from benchmarks.run import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_model_folder_is_read_by_transformers(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_config(tmp_path / family, family, heads=16, layers=3)
    read = transformers.AutoConfig.from_pretrained(folder)
    assert (read.num_hidden_layers, read.num_attention_heads, read.kv_lora_rank) == (3, 16, 512)
    assert hasattr(read, "index_topk") == (family != "v3")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert tokenizer.encode("t17 t40") == [17, 40]


def test_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match="family='v4': expected one of v32, glm, v3"):
        config("v4", 16, 4)


def test_weights_are_those_of_a_real_checkpoint() -> None:
    """Names and ranks of the tiny model, which SGLang and transformers load, plus the scales of fp8 blocks."""
    safetensors = pytest.importorskip("safetensors")
    small = {"hidden_size": 256, "intermediate_size": 192, "vocab_size": 64, "q_lora_rank": 128, "index_n_heads": 2}
    ours = weights({**config("v32", 4, 3), **small}, "cpu")
    with safetensors.safe_open(ROOT / "examples" / "models" / "tiny-dsa-2k" / "model.safetensors", "pt") as file:
        theirs = {name: len(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    scales = {name for name in ours if name.endswith("_scale_inv")}
    assert {name: t.dim() for name, t in ours.items() if name not in scales} == theirs
    assert {name.removesuffix("_scale_inv") for name in scales} == {
        name for name, t in ours.items() if t.dtype == torch.float8_e4m3fn
    }
    assert ours["model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    down = (
        ours["model.layers.0.mlp.down_proj.weight"].float()
        * ours["model.layers.0.mlp.down_proj.weight_scale_inv"][0, 0]
    )
    assert abs(down.std().item() - 192**-0.5) < 0.01
    plain = weights({**config("v32", 4, 3, quantized=False), **small}, "cpu")
    assert {name: t.dim() for name, t in plain.items()} == theirs
    assert {t.dtype for t in plain.values()} == {torch.bfloat16}
    assert abs(plain["model.layers.0.mlp.down_proj.weight"].float().std().item() - 192**-0.5) < 0.01


class Log:
    """A server that logs three decode intervals for every request; the first `apart` requests do not run together."""

    def __init__(self, path: Path, apart: int = 0):
        self.log_path = path
        self.apart = apart
        path.write_text("#running-req: 2, x, gen throughput (token/s): 9999.0\n")

    def post(self, path: str, body: dict, timeout: float) -> None:
        assert len(body["input_ids"]) == 5
        together = 2 if self.apart <= 0 else 1
        self.apart -= 1
        with self.log_path.open("a") as file:
            for running, rate in ((1, 5000), (together, 100.0), (together, 250.0)):
                file.write(f"Decode batch, #running-req: {running}, #token: 1, gen throughput (token/s): {rate}, x\n")


def test_step_comes_from_lines_of_this_batch_only(tmp_path: Path) -> None:
    row = engine_h200._decode_step(Log(tmp_path / "log"), 2, 5, 4, shared=0)
    assert row["tokens_per_second"] == 250.0
    assert row["step_us"] == 8000.0
    assert row["log_lines"] == 3


def test_a_batch_that_never_ran_as_a_whole_is_asked_once_more(tmp_path: Path) -> None:
    row = engine_h200._decode_step(Log(tmp_path / "late", apart=2), 2, 5, 4, shared=0)
    assert row["step_us"] == 8000.0
    assert engine_h200._decode_step(Log(tmp_path / "never", apart=9), 2, 5, 4, shared=0)["step_us"] is None


def test_prompts_grow_and_the_cache_holds_their_longest_versions() -> None:
    shapes = engine_h200._shapes(engine_h200.argparse.Namespace(shapes=["1:32", "2:8", "4:8"]))
    assert shapes == [(4, 8), (2, 8), (1, 32)]
    assert engine_h200._cache_tokens(shapes, 10) == (32 + 8 + 8 + 8) + 7 * 138 + 8192


def test_prompts_share_what_they_should() -> None:
    short, long = engine_h200._prompt(1, 200, 150), engine_h200._prompt(1, 300, 150)
    other = engine_h200._prompt(2, 300, 150)
    assert len(short) == 200
    assert short[:136] == other[:136]
    assert long[:150] == other[:150]
    assert long[150:160] != other[150:160]
    assert engine_h200._prompt(3, 300, 0)[:200] == engine_h200._prompt(3, 200, 0)


def test_table_gives_ratios_to_the_first_arm(capsys: pytest.CaptureFixture) -> None:
    arms = (("nsa_plugin", 1000.0), ("dsa", 1300.0))
    rows = [{"arm": a, "batch": 64, "context": 8192, "step_us": us} for a, us in arms]
    engine_h200._print_served([*rows, {"arm": "dsa", "batch": 1, "context": 8192, "step_us": None}])
    out = capsys.readouterr().out
    assert "1.30" in out


def test_results_carry_environment_options_and_the_machines_name(tmp_path: Path) -> None:
    options = engine_h200.arguments().parse_args(["served", f"--out={tmp_path}", "--kv=auto"])
    path = output.prepare(options, "served", "v32", "auto", "h16")
    assert path.name == f"served-v32-auto-h16-{environment.machine('cpu')}.json"
    output.save(path, options, [{"step_us": 1.0}], starts=[{"healthy_s": 2.0}])
    body = json.loads(path.read_text())
    assert (body["options"]["family"], body["options"]["heads"], body["rows"]) == ("v32", 16, [{"step_us": 1.0}])
    assert body["starts"] == [{"healthy_s": 2.0}]
    assert {"device", "libraries", "date", "command"} <= set(body["environment"])


def test_a_results_file_that_exists_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["served", f"--out={tmp_path}", "--kv=auto"]
    path = tmp_path / f"served-v32-auto-h16-{environment.machine('cpu')}.json"
    path.write_text("precious")
    assert cli.main(words) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert path.read_text() == "precious"
    assert output.prepare(engine_h200.arguments().parse_args([*words, "--force"]), *path.stem.split("-")[:4]) == path


def test_every_step_of_the_whole_run_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_engine.shutil, "which", lambda name: f"/usr/bin/{name}")
    steps = run_engine.commands(tmp_path)
    assert {"tests", "memcheck"} <= set(steps)
    for name in run_engine.MEASUREMENTS:
        words = steps[name].command
        options = engine_h200.arguments().parse_args(words[3:])
        assert options.out == tmp_path
        engine_h200.parse_arms(options.arms or ["nsa_plugin", "dsa"])
        assert engine_h200._shapes(options)


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    start = time.monotonic()
    assert run_engine._run("slow", run_engine.Step(10, 1, command), tmp_path, dict(os.environ)) == 124
    assert time.monotonic() - start < 120
    assert "begun\n== slow: exit code 124" in capsys.readouterr().out


@pytest.mark.parametrize(
    "gpus, together",
    [("0,1,2,3", ["one", "two", "another"]), ("5,7", ["another", "more"]), ("", ["one"])],
)
def test_steps_share_a_host(gpus: str, together: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own GPUs while it runs; where there are none, one runs at a time."""
    script = f"""
import os, sys, time
from pathlib import Path
print(os.environ["CUDA_VISIBLE_DEVICES"] or "-", time.time())
name, *others = sys.argv[1:]
Path({str(tmp_path)!r}, name).touch()
while not all(Path({str(tmp_path)!r}, other).exists() for other in others):  # however slowly they start
    time.sleep(0.01)
print(time.time())
"""
    wanted = {"one": 1, "two": 2, "another": 1, "more": 1}
    steps = {
        name: run_engine.Step(
            120, number, [sys.executable, "-c", script, name, *(together if name in together else [])]
        )
        for name, number in wanted.items()
    }
    monkeypatch.setattr(run_engine, "commands", lambda out, force: steps)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert run_engine.main([f"--out={tmp_path}"]) == 0
    spans = []
    for name, number in wanted.items():
        (used, begin), (end,) = (line.split() for line in (tmp_path / f"{name}.log").read_text().splitlines())
        taken = set(used.split(",")) & set(gpus.split(","))
        assert len(taken) == min(number, len(gpus.split(","))) or not gpus
        spans.append((float(begin), float(end), taken))
    at_once = [[other for other in spans if other[0] <= begin < other[1]] for begin, _, _ in spans]
    for group in at_once:
        names = [gpu for _, _, taken in group for gpu in taken]
        assert len(names) == len(set(names))
    assert max(map(len, at_once)) == len(together)


def test_no_gpu_test_is_left_out(tmp_path: Path) -> None:
    """Of `make test-gpu`, and of the steps."""
    recipe = re.search(r"^test-gpu:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    steps = [step.command for step in run_engine.commands(tmp_path).values()]
    for run in (recipe[1].split(), [word for command in steps for word in command]):
        folders = [ROOT / word for word in run if word.startswith("tests/")]
        for path in (ROOT / "tests").rglob("test_*.py"):
            if "mark.gpu" in path.read_text():
                assert any(path.is_relative_to(folder) for folder in folders), path
