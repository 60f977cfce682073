"""The CPU platform against its base class, and the requests and flags that once ended a CPU server."""

from __future__ import annotations

import inspect
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nsa_backend_plugin.serving import Server
from tests.engine.conftest import SERVER_ENV
from tests.processes import HANGS_AFTER

pytest.importorskip("sglang", reason="needs SGLang")

pytestmark = pytest.mark.engine


def _left_to_platforms() -> Iterator[tuple[str, object]]:
    """Methods that SGLang's base classes only declare, in the installed release."""
    from sglang.srt.platforms.device_mixin import DeviceMixin
    from sglang.srt.platforms.interface import SRTPlatform

    for base in (SRTPlatform, DeviceMixin):
        for name, member in vars(base).items():
            if inspect.isfunction(member) and "raise NotImplementedError" in inspect.getsource(member):
                yield name, member


def test_every_method_that_sglang_leaves_to_a_platform_is_implemented_or_refused():
    from nsa_backend_plugin.engine.cpu.platform import NsaPluginCpuPlatform

    declared = dict(_left_to_platforms())
    assert len(declared) > 8
    platform = NsaPluginCpuPlatform()
    values = {"device": "cpu", "algorithm": "EAGLE"}
    refusals = {}
    for name, member in declared.items():
        method = getattr(platform, name)
        assert method.__func__ is not member, f"{name} is the base class's"
        needed = [p for p in inspect.signature(method).parameters.values() if p.default is p.empty]
        try:
            method(*(values.get(p.name, 0) for p in needed))
        except ValueError as refused:
            refusals[name] = str(refused)
    assert [name for name, words in refusals.items() if "tart with" not in words] == []


def test_the_device_of_the_platform_is_text():
    """SGLang takes it for --device where the user gave none."""
    from nsa_backend_plugin.engine.cpu.platform import NsaPluginCpuPlatform

    assert NsaPluginCpuPlatform().get_device() == "cpu"


def test_memory_that_is_asked_for_pinned_is_pageable_within_the_hook():
    from nsa_backend_plugin.engine.cpu import bridges

    def allocate(size: int) -> torch.Tensor:
        return torch.full((size,), -1, pin_memory=True) + torch.tensor([1], pin_memory=True).pin_memory()

    with pytest.raises(RuntimeError):
        allocate(2)
    assert bridges.grammar_mask(lambda grammar, size: allocate(size), SimpleNamespace(), 2).tolist() == [0, 0]


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started as a user may: the backend's name in a file, neither a device nor an amount of memory."""
    folder = tmp_path_factory.mktemp("platform")
    config = folder / "server.yaml"
    config.write_text("attention-backend: nsa_plugin\nsleep-on-idle: true\n")
    args = ("--config", str(config))
    env = {**SERVER_ENV, "NSA_PLUGIN_CPU": "auto"}
    with Server(models["dsa"], args, env, log_path=folder / "log", timeout=HANGS_AFTER) as running:
        yield running


def _ask(server: Server, path: str = "/generate", **body: object) -> tuple[int, str]:
    """(status, text) of a request; without a body, of a short prompt."""
    body = body or {"input_ids": [5, 6, 7], "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_cache_does_not_take_the_machines_memory(server: Server) -> None:
    assert "nsa_plugin keeps 65536 tokens on a CPU; --max-total-tokens changes that" in server.log_path.read_text()
    assert _ask(server)[0] == 200


def test_a_request_with_a_grammar_is_answered(server: Server) -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    status, text = _ask(server, input_ids=[5, 6, 7], sampling_params={"json_schema": schema, "max_new_tokens": 8})
    assert status == 200, text
    assert json.loads(text)["text"].lstrip().startswith("{")


def test_profiling_is_answered(server: Server, tmp_path: Path) -> None:
    status, text = _ask(server, "/start_profile", output_dir=str(tmp_path), num_steps=1)
    assert status == 200, text
    assert _ask(server)[0] == 200


@pytest.mark.parametrize("token", [10**7, -3])
def test_a_token_outside_the_vocabulary_is_a_bad_request(server: Server, token: int) -> None:
    status, text = _ask(server, input_ids=[5, token], sampling_params={"max_new_tokens": 4})
    assert status == 400
    assert f"input_ids has the token {token}: the model's tokens are 0 to" in text
    assert _ask(server)[0] == 200
