"""What the GPU tests say of a server that fails: one run on a borrowed host has to tell why."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from nsa_backend_plugin import serving
from tests.engine import drafting
from tests.engine.conftest import run_python

pytestmark = pytest.mark.engine


def test_a_log_is_told_by_its_first_error_and_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [f"early {n}" for n in range(100)]
    lines += ["Scheduler hit an exception: Traceback (most recent call last):", "ValueError: the reason"]
    log.write_text("\n".join([*lines, *(f"late {n}" for n in range(300)), "killed"]))
    said = drafting.said(log).splitlines()
    assert said[:3] == [f"of {log}:", *lines[-2:]]
    assert said[-1] == "killed"
    assert len(said) == len(set(said)) == 1 + 60 + 40
    log.write_text("\n".join(lines))
    assert drafting.said(log).splitlines()[1:] == [*lines[-2:]]
    log.write_text("\n".join(lines[:100]))
    assert drafting.said(log).splitlines()[1:] == lines[60:100]
    assert drafting.said(tmp_path / "none") == f"of {tmp_path / 'none'}:"


@pytest.mark.parametrize("error", [ValueError("no such key"), serving.ServerError("not healthy\nend of the log")])
def test_an_error_has_the_log_once(tmp_path: Path, error: Exception) -> None:
    log = tmp_path / "log"
    log.write_text("the reason\n")

    def fail(_gpu: int) -> None:
        with drafting.explained_by(log):
            raise error

    found = drafting.at_once({"arm": fail, "other": lambda gpu: "answer"})
    assert drafting.result(found, "other") == "answer"
    with pytest.raises(RuntimeError, match=r"(no such key|^not healthy)\nof .*log:\nthe reason$"):
        drafting.result(found, "arm")
    with pytest.raises(RuntimeError, match=r"^arm: as above, .*(no such key|not healthy)$"):
        drafting.result(found, "arm")


def test_gpus_are_given_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting.torch.cuda, "device_count", lambda: 2)
    names = ["a", "b", "c"]
    assert drafting.at_once({name: partial(lambda n, gpu: (n, gpu), name) for name in names}) == {
        "a": ("a", 0),
        "b": ("b", 1),
        "c": ("c", 0),
    }


def test_arms_have_files_of_plain_names() -> None:
    assert drafting.file_name("bf16, dcp, ag_rs, again") == "bf16-dcp-ag_rs-again"


OF_SERVERS = """
import pytest
from tests.engine.drafting import chosen

@pytest.fixture(scope="module", params=["dsa", "mla"])
def servers(request):
    return chosen(request, "arm")

@pytest.mark.parametrize("arm", ["one", "two", "three"])
def test_servers(arm, servers, request):
    print("started", request.node.callspec.params["servers"], servers)

@pytest.mark.parametrize("arm", ["others"])
def test_others(arm): ...
"""


def test_servers_that_no_chosen_test_asks_are_not_started(tmp_path: Path) -> None:
    (tmp_path / "test_of_servers.py").write_text(OF_SERVERS)
    options = ("-q", "-s", "-p", "no:cacheprovider", "-k", "others or (mla and not two) or dsa-three")
    said = run_python("pytest", *options, f"--rootdir={tmp_path}", tmp_path / "test_of_servers.py")
    started = {line.removeprefix(".") for line in said.splitlines() if "started" in line}
    assert started == {"started dsa ['three']", "started mla ['one', 'three']"}
