"""The entry points: when the CPU platform is taken, what the ledger holds, and that a broken part keeps the name.

What needs SGLang itself is in tests/engine.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from nsa_backend_plugin import plugin
from nsa_backend_plugin.engine import launch, ledger
from nsa_backend_plugin.engine import release as sglang_release

CLASS = "nsa_backend_plugin.engine.cpu.platform.NsaPluginCpuPlatform"
NAMED = ["launch_server.py", "--attention-backend", "nsa_plugin"]


@pytest.fixture
def command_line(monkeypatch):
    """Set sys.argv and the environment as at the start of a server on a machine without an accelerator."""

    def set_to(argv: list[str], accelerator: bool = False, **env: str) -> None:
        for name in [n for n in os.environ if n.startswith("NSA_PLUGIN_")] + ["SGLANG_USE_CPU_ENGINE"]:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)

    return set_to


@pytest.mark.parametrize(
    "argv", [NAMED, [*NAMED, "--device", "cpu"], ["x", "--device=cpu", "--attention-backend=nsa_plugin"]]
)
def test_cpu_platform_is_taken_where_nsa_plugin_is_named(command_line, argv):
    command_line(argv)
    assert plugin.activate_cpu_platform() == CLASS


@pytest.mark.parametrize(
    "argv",
    [
        ["launch_server.py"],
        ["launch_server.py", "--attention-backend", "torch_native", "--device", "cpu"],
        [*NAMED, "--device", "cuda"],
        [*NAMED, "--device=xpu"],
    ],
)
def test_cpu_platform_stays_out_otherwise(command_line, argv):
    command_line(argv)
    assert plugin.activate_cpu_platform() is None


@pytest.mark.parametrize(
    "text, taken",
    [
        ("attention-backend: nsa_plugin", True),
        ("attention_backend: nsa_plugin\ndevice: cpu", True),
        ("attention-backend: nsa_plugin\ndevice: cuda", False),
        ("attention-backend: torch_native", False),
        ("- a list", False),
        ("a: [broken", False),
        ("1: 2\nattention-backend: nsa_plugin", True),
        ("attention-backend: nsa_plugin # caf\xe9", False),  # not UTF-8
        ("", False),
    ],
)
@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("name", ["server.yaml", "a=b c.yaml"])
def test_cpu_platform_is_found_in_a_configuration_file(command_line, tmp_path, text, taken, words, name):
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    command_line(["launch_server.py", *(["--config", str(path)] if words == 2 else [f"--config={path}"])])
    assert (plugin.activate_cpu_platform() == CLASS) is taken


def test_the_command_line_wins_over_a_configuration_file(command_line, tmp_path):
    (tmp_path / "server.yaml").write_text("attention-backend: nsa_plugin\ndevice: cuda")
    command_line(["launch_server.py", "--config", str(tmp_path / "server.yaml"), "--device", "cpu"])
    assert plugin.activate_cpu_platform() == CLASS
    command_line(["launch_server.py", "--config", str(tmp_path / "missing.yaml")])
    assert plugin.activate_cpu_platform() is None


def test_a_cpu_without_the_platform_is_refused_with_what_to_set(monkeypatch):
    """`sgl.Engine(device="cpu")` in a script of the user's: no command line names nsa_plugin."""
    from nsa_backend_plugin.engine.cpu import platform

    monkeypatch.setattr(platform, "active", lambda: False)
    launch.check_platform("cuda")
    with pytest.raises(ValueError, match="set NSA_PLUGIN_CPU=1 in the environment of the launch, before SGLang is"):
        launch.check_platform("cpu")


def test_every_handler_says_when_it_serves():
    """`hooks.fired` with the name of one of its rows, in the handler's own module."""
    for row in ledger.LEDGER:
        if row.handler:
            module = Path(launch.__file__).parent / (row.handler.split(":")[0].replace(".", "/") + ".py")
            names = {r.name for r in ledger.LEDGER if r.handler == row.handler}
            assert any(re.search(rf'hooks\.fired\(.*"{name}"', module.read_text()) for name in names), row.name


def test_a_request_with_a_token_outside_the_vocabulary_is_refused():
    from types import SimpleNamespace

    from nsa_backend_plugin.engine import requests

    names = {"attention_backend": "nsa_plugin", "prefill_attention_backend": None, "decode_attention_backend": None}
    manager = SimpleNamespace(server_args=SimpleNamespace(**names), model_config=SimpleNamespace(vocab_size=10))
    taken = []

    def check(*arguments):
        taken.append(arguments)

    for input_ids in ([0, 9], [], None):
        requests.inside_vocabulary(check, manager, "request", input_ids)
    for token in (10, -1):
        with pytest.raises(ValueError, match=f"input_ids has the token {token}: the model's tokens are 0 to 9"):
            requests.inside_vocabulary(check, manager, "request", [0, token])
    manager.server_args.attention_backend = "triton"  # not ours to judge
    requests.inside_vocabulary(check, manager, "request", [10])
    assert [ids for _, _, ids in taken] == [[0, 9], [], None, [10]]


def test_cpu_platform_is_inert_on_accelerator_hosts_and_beside_sglangs_cpu_engine(command_line):
    command_line(NAMED, accelerator=True)
    assert plugin.activate_cpu_platform() is None
    command_line(NAMED, SGLANG_USE_CPU_ENGINE="1")
    assert plugin.activate_cpu_platform() is None


def test_cpu_platform_can_be_forced_and_switched_off(command_line):
    command_line(["python"], accelerator=True, NSA_PLUGIN_CPU="1")
    assert plugin.activate_cpu_platform() == CLASS
    command_line(NAMED, NSA_PLUGIN_CPU="0")
    assert plugin.activate_cpu_platform() is None
    command_line(NAMED, NSA_PLUGIN_CPU="1", NSA_PLUGIN_DISABLE="1")
    assert plugin.activate_cpu_platform() is None


@pytest.mark.parametrize(
    "release, ok",
    [
        ("0.5.16", False),
        ("0.5.17", True),
        ("0.5.19.post1", True),
        (f"{sglang_release.RELEASES[-1]}.post1", True),
        ("0.5.99", False),
        ("0.6.0", False),
        ("1.0", False),
        ("unknown", False),
    ],
)
def test_supported_range(release, ok):
    assert sglang_release.supported(release) is ok


def test_unsupported_release_is_an_error_with_both_versions(monkeypatch):
    monkeypatch.setattr(sglang_release, "version", lambda: "0.5.99")
    with pytest.raises(ValueError, match=rf"SGLang 0\.5\.99 .*install sglang {sglang_release.RANGE}"):
        sglang_release.require_supported()


def test_exact_mode_needs_float32_on_cpu(monkeypatch):
    monkeypatch.setenv("NSA_PLUGIN_EXACT", "1")
    launch.check_exact(torch.float32, torch.device("cpu"))
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float32, "cuda")):
        with pytest.raises(ValueError, match=r"NSA_PLUGIN_EXACT=1 .*--dtype float32"):
            launch.check_exact(dtype, torch.device(device))
    with pytest.raises(ValueError, match=r"NSA_PLUGIN_EXACT=1 with --disaggregation-mode decode: .*not transferred"):
        launch.check_exact(torch.float32, torch.device("cpu"), "decode")


def test_ledger_rows_are_complete_and_unique():
    assert len({row.name for row in ledger.LEDGER}) == len(ledger.LEDGER)
    for row in ledger.LEDGER:
        assert row.kind in ("call", "append", "hook", "subclass", "op", "attribute")
        assert row.stage in ("name", "start", "cpu", "factory", "gpu", "gpu_dsa")
        assert row.why
        assert row.versions
        assert row.upstream
        assert bool(row.handler) == (row.kind in ("hook", "op"))


def test_entry_points_are_declared():
    for group, name in (("sglang.srt.plugins", "nsa_plugin"), ("sglang.srt.platforms", "nsa_plugin_cpu")):
        [entry] = importlib.metadata.entry_points(group=group, name=name)
        assert callable(entry.load())
