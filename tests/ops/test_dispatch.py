"""Choice among implementations, on an operation whose folder gains files for the length of a test."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import textwrap

import pytest
import torch

from nsa_backend_plugin import settings
from nsa_backend_plugin.ops import arch, dispatch, preferences, topk
from nsa_backend_plugin.ops.call import Declined, Step
from nsa_backend_plugin.ops.preferences import Preference

VARIABLE = settings.impl_variable("topk")
CPU = torch.device("cpu")


def forget() -> None:
    importlib.invalidate_caches()
    dispatch.forget()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Write implementations into the topk folder: `folder(name, source)`."""
    for name in list(os.environ):
        if name.startswith("NSA_PLUGIN_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(topk, "__path__", [*topk.__path__, str(tmp_path)])
    written = []

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        written.append(name)
        forget()

    forget()
    yield write
    for name in written:
        sys.modules.pop(f"{topk.__name__}.{name}", None)
        if hasattr(topk, name):
            delattr(topk, name)
    monkeypatch.undo()
    forget()


@pytest.fixture
def force(monkeypatch):
    """Set the variable that forces implementations of topk: `force("vendor,torch")`."""

    def set_variable(names: str) -> None:
        monkeypatch.setenv(VARIABLE, names)
        dispatch.forget()

    return set_variable


VENDOR = """
    def available(arch): return {reason!r}
    def select(call): return call.out.fill_({fill})
"""


def vendor(reason: str | None = None, fill: int = 42) -> str:
    return VENDOR.format(reason=reason, fill=fill)


def select(**kwargs) -> torch.Tensor:
    logits = torch.randn(2, 8)
    return topk.select(logits, torch.tensor([8, 3], dtype=torch.int32), 4, **kwargs)


def served(name: str) -> topk.Select:
    """A call of a decode step on an architecture that is not here, without memory behind it."""
    with arch.pretended(name) as device:
        logits = torch.empty(2, 8192, device=device)
        return topk.select.call(logits, torch.empty(2, dtype=torch.int32, device=device), 2048)


def test_a_new_file_is_found_and_can_be_forced(folder, force):
    assert "vendor" not in dispatch.implementation_names("topk")
    folder("vendor", vendor())
    assert "vendor" in dispatch.implementation_names("topk")
    assert select(impl="vendor").eq(42).all()
    assert not select().eq(42).any(), "without a preference row the reference wins on CPU"
    force("vendor")
    assert select().eq(42).all()


def test_reference_is_named_torch_and_private_files_are_hidden(folder):
    folder("_helper", "raise RuntimeError('imported')")
    names = dispatch.implementation_names("topk")
    assert "torch" in names
    assert "reference" not in names
    assert "_helper" not in names


@pytest.mark.parametrize("source", ["impl", "variable"])
def test_unknown_implementation_lists_the_valid_ones(folder, force, source):
    folder("vendor", vendor())
    if source == "variable":
        force("cuda_magic")
    with pytest.raises(ValueError, match="'cuda_magic': expected one of ") as caught:
        select(impl="cuda_magic" if source == "impl" else None)
    assert str(caught.value).startswith("impl=" if source == "impl" else f"{VARIABLE}=")
    assert "torch" in str(caught.value)
    assert "vendor" in str(caught.value)
    if source == "variable":
        with pytest.raises(ValueError, match=VARIABLE):
            dispatch.validate_forced()


def test_forced_implementation_that_cannot_run_fails_with_its_reason(folder, force):
    folder("vendor", vendor("needs four arms"))
    with pytest.raises(ValueError, match=r"topk\.select: forced implementation cannot run \(vendor: needs four arms\)"):
        select(impl="vendor")
    force("vendor")
    with pytest.raises(ValueError, match="needs four arms"):
        select()
    with pytest.raises(ValueError, match=rf"{VARIABLE}=vendor: cannot run on cpu \(vendor: needs four arms\)"):
        dispatch.require_forced(CPU)
    force("vendor,torch")
    dispatch.require_forced(CPU)
    assert select().shape == (2, 4)


@pytest.mark.parametrize(
    "source, words",
    [
        ("import a_library_nobody_has", "a_library_nobody_has"),
        ("this is no Python", "SyntaxError"),
        ("raise OSError('libcuda.so.1')", "libcuda.so.1"),
        ("def available(arch): raise RuntimeError('versions differ')\ndef select(call): ...", "versions differ"),
        ("def select(call): ...", "has no attribute 'available'"),
    ],
)
def test_a_broken_file_is_a_reason_not_a_crash(folder, source, words):
    """It would stop every launch, and `doctor`, for a kernel that nobody chose."""
    folder("vendor", source)
    verdicts = {v.name: v.reason for v in topk.select.explain(served("sm_90")).verdicts}
    assert words in verdicts["vendor"]
    assert select().shape == (2, 4)
    with pytest.raises(Declined) as caught:
        select(impl="vendor")
    assert words in caught.value.reasons["vendor"]


DECLINES = """
    def declines_select(call): return f"k={call.k} is more than 2" if call.k > 2 else None
"""


def test_a_single_call_is_declined(folder, force, caplog):
    folder("vendor", vendor() + DECLINES)
    force("vendor,torch")
    logits, lengths = torch.randn(1, 8), torch.tensor([8], dtype=torch.int32)
    with caplog.at_level(logging.INFO):
        assert topk.select(logits, lengths, 2).eq(42).all()
        for _ in range(3):
            assert not topk.select(logits, lengths, 3).eq(42).any()
    said = [r.getMessage() for r in caplog.records]
    assert [line for line in said if "vendor declines" in line and "k=3 is more than 2" in line] == said[1:2], "once"
    assert "vendor runs" in said[0]
    assert "torch runs" in said[2]
    assert len(said) == 3
    with pytest.raises(Declined, match="k=3 is more than 2") as caught:
        topk.select(logits, lengths, 3, impl="vendor")
    assert caught.value.reasons == {"vendor": "k=3 is more than 2"}


def test_a_file_without_the_function_is_no_candidate(folder):
    folder("vendor", "def available(arch): return None\n")
    assert "vendor" not in topk.select.implementations()
    with pytest.raises(Declined, match="has no select"):
        select(impl="vendor")


def test_workspace_is_the_largest_of_those_available(folder):
    sized = "    def workspace_bytes_select(device, rows): return rows * {} * (device.type == 'cpu')\n"
    folder("small", vendor() + sized.format(10))
    folder("large", vendor() + sized.format(30))
    folder("absent", vendor("no") + sized.format(90))
    assert topk.select.workspace_bytes(CPU, rows=3) == 90


ROWS = (
    Preference("topk.select", "sm_90", ("a", "b"), "test", {"k": 2048, "rows": (1, 16)}),
    Preference("topk.select", "cuda", ("c",), "test"),
    Preference("topk.select", "*", ("d",), "test"),
    Preference("topk.select", "rocm", ("never",), "test"),
)


@pytest.mark.parametrize(
    "arch, facts, expected",
    [
        ("sm_90", {"k": 2048, "rows": 1}, ("a", "b")),
        ("sm_90", {"k": 2048, "rows": 16}, ("a", "b")),
        ("sm_90", {"k": 2048, "rows": 17}, ("c",)),
        ("sm_90", {"k": 64, "rows": 1}, ("c",)),
        ("sm_80", {"k": 2048, "rows": 1}, ("c",)),
        ("gfx942", {"k": 2048, "rows": 1}, ("d",)),
        ("cpu", {"k": 2048, "rows": 1}, ("d",)),
    ],
)
def test_preference_rows(monkeypatch, arch, facts, expected):
    monkeypatch.setattr(preferences, "TABLE", ROWS)
    dispatch.forget()
    assert ROWS[preferences.applying("topk.select", arch, lambda: facts)].order == expected
    assert preferences.applying("topk.other", "sm_90", lambda: facts) == -1
    monkeypatch.undo()
    dispatch.forget()


def test_preferred_then_triton_then_torch(folder, monkeypatch):
    folder("vendor", vendor() + DECLINES)
    monkeypatch.setattr(preferences, "TABLE", (Preference("topk.select", "sm_90", ("vendor",), "test"),))
    dispatch.forget()
    explained = topk.select.explain(served("sm_90"))
    assert [v.name for v in explained.verdicts][:3] == ["vendor", "triton", "torch"]
    assert explained.chosen == "triton"
    assert explained.verdicts[0].reason == "k=2048 is more than 2"
    assert str(explained).startswith("topk.select: triton for rows=2 columns=8192 k=2048")
    assert "(test)" in str(explained)


def test_the_report_is_what_runs(folder, monkeypatch, device):
    """`explain` and `run` ask the same questions, also where a preference has a condition."""
    for name, fill in (("few", 1), ("many", 2)):
        folder(name, vendor(fill=fill))
    rows = (
        Preference("topk.select", "*", ("few",), "test", {"rows": (1, 4)}),
        Preference("topk.select", "*", ("many",), "test"),
    )
    monkeypatch.setattr(preferences, "TABLE", rows)
    monkeypatch.setattr(topk, "device_arch", lambda device: "sm_90")
    dispatch.forget()
    for count, fill, name in ((4, 1, "few"), (5, 2, "many")):
        logits, lengths = torch.randn(count, 8), torch.full((count,), 8, dtype=torch.int32)
        assert topk.select.explain(topk.select.call(logits, lengths, 4)).chosen == name
        assert topk.select(logits, lengths, 4).eq(fill).all()


def test_torch_on_a_gpu_is_a_warning_and_never_captured(folder, monkeypatch, caplog):
    monkeypatch.setattr(topk, "device_arch", lambda device: "sm_90")
    monkeypatch.setattr(preferences, "TABLE", ())
    monkeypatch.setattr("nsa_backend_plugin.ops.topk.triton.declines_select", lambda call: "not today")
    dispatch.forget()
    assert select().shape == (2, 4)
    assert [r.levelno for r in caplog.records if "torch runs" in r.getMessage()] == [logging.WARNING]
    monkeypatch.setattr(dispatch, "capturing", lambda device: True)
    with pytest.raises(Declined, match="CUDA graph cannot capture") as caught:
        select()
    assert caught.value.reasons["triton"] == "not today"
    assert select(impl="torch").shape == (2, 4), "whoever insists gets it"


def test_table_names_known_operations_and_files_with_a_source():
    known = {operation.name: operation for operation in dispatch.operations()}
    for row in preferences.TABLE:
        assert row.operation in known
        dispatch.check_names(known[row.operation].op, row.order, row.operation)
        assert row.source


def test_no_implementation_at_all(folder, monkeypatch):
    monkeypatch.setattr(dispatch, "_unavailable", lambda *a: "not today")
    dispatch.forget_plans()
    with pytest.raises(Declined, match=r"topk\.select: no implementation can run \(.*torch: not today"):
        select()


def test_every_folder_of_ops_is_an_operation():
    assert set(settings.OPERATIONS) == {operation.op for operation in dispatch.operations()}


def test_a_step_keeps_what_depends_on_the_same_tensors():
    step, made = Step(), []

    def of(tensor: torch.Tensor) -> int:
        def make() -> int:
            made.append(tensor)
            return len(made)

        return step.once("plan", make, tensor)

    lengths = torch.tensor([1, 2, 3])
    assert of(lengths) == of(lengths) == 1
    assert of(lengths[1:]) == 2
    assert [of(torch.tensor([n])) for n in range(50)] == list(range(3, 53)), "a freed tensor's address is not reused"
    assert step.once("other", lambda: "x", device=lengths.device) == "x"
    assert Step().once("plan", lambda: 0, lengths) == 0


def test_what_is_made_eagerly_is_made_again_in_a_capture(monkeypatch):
    step, lengths = Step(), torch.tensor([1])
    assert step.once("plan", lambda: "eager", lengths) == "eager"
    monkeypatch.setattr("nsa_backend_plugin.ops.call.capturing", lambda device: True)
    assert step.once("plan", lambda: "captured", lengths) == "captured"
    assert step.once("plan", lambda: "again", lengths) == "captured"
