"""Choice among implementations, on an operation whose folder gains files for the length of a test."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap

import pytest
import torch

from nsa_backend_plugin import settings
from nsa_backend_plugin.ops import preferences, registry, topk
from nsa_backend_plugin.ops.preferences import Preference
from nsa_backend_plugin.ops.registry import Operation

VARIABLE = settings.impl_variable("topk")
CPU = torch.device("cpu")
CACHED = (registry.implementation_names, registry._load, registry._available)


def clear_caches() -> None:
    importlib.invalidate_caches()
    for function in CACHED:
        function.cache_clear()


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
        clear_caches()

    clear_caches()
    yield write
    for name in written:
        sys.modules.pop(f"{topk.__name__}.{name}", None)
        if hasattr(topk, name):
            delattr(topk, name)
    clear_caches()


VENDOR = """
    from nsa_backend_plugin.ops.support import Support
    def available(arch): return Support({ok}, "{reason}")
    def select(logits, lengths, k, *, out, **rest): out.fill_({fill})
"""


def select(**kwargs) -> torch.Tensor:
    logits = torch.randn(2, 8)
    return topk.select(logits, torch.tensor([8, 3], dtype=torch.int32), 4, **kwargs)


def test_a_new_file_is_found_and_can_be_forced(folder, monkeypatch):
    assert "vendor" not in registry.implementation_names("topk")
    folder("vendor", VENDOR.format(ok=True, reason="", fill=42))
    assert "vendor" in registry.implementation_names("topk")
    assert select(impl="vendor").eq(42).all()
    assert not select().eq(42).any(), "without a preference row the reference wins on CPU"
    monkeypatch.setenv(VARIABLE, "vendor")
    assert select().eq(42).all()


def test_reference_is_named_torch_and_private_files_are_hidden(folder):
    folder("_helper", "raise RuntimeError('imported')")
    names = registry.implementation_names("topk")
    assert "torch" in names
    assert "reference" not in names
    assert "_helper" not in names


@pytest.mark.parametrize("source", ["impl", "variable"])
def test_unknown_implementation_lists_the_valid_ones(folder, monkeypatch, source):
    folder("vendor", VENDOR.format(ok=True, reason="", fill=42))
    if source == "variable":
        monkeypatch.setenv(VARIABLE, "cuda_magic")
    with pytest.raises(ValueError, match="'cuda_magic': expected one of ") as caught:
        select(impl="cuda_magic" if source == "impl" else None)
    assert str(caught.value).startswith("impl=" if source == "impl" else f"{VARIABLE}=")
    assert "torch" in str(caught.value)
    assert "vendor" in str(caught.value)
    if source == "variable":
        with pytest.raises(ValueError, match=VARIABLE):
            registry.validate_forced()


def test_forced_implementation_that_cannot_run_fails_with_its_reason(folder, monkeypatch):
    folder("vendor", VENDOR.format(ok=False, reason="needs four arms", fill=42))
    with pytest.raises(ValueError, match=r"topk\.select: forced implementation cannot run \(vendor: needs four arms\)"):
        select(impl="vendor")
    monkeypatch.setenv(VARIABLE, "vendor")
    with pytest.raises(ValueError, match="needs four arms"):
        select()
    with pytest.raises(ValueError, match=rf"{VARIABLE}=vendor: cannot run on cpu \(vendor: needs four arms\)"):
        registry.require_forced(CPU)
    monkeypatch.setenv(VARIABLE, "vendor,torch")
    registry.require_forced(CPU)
    assert select().shape == (2, 4)


def test_an_import_error_is_a_reason_not_a_crash(folder):
    folder("vendor", "import a_library_nobody_has")
    row = next(c for c in Operation.all["topk.select"].candidates(CPU) if c.name == "vendor")
    assert not row.support.ok
    assert "a_library_nobody_has" in row.support.reason
    assert select().shape == (2, 4)


def test_accepts_declines_a_single_call(folder, monkeypatch):
    source = (
        VENDOR
        + """
    def accepts_select(logits, lengths, k, **rest): return Support(k <= 2, f"k={{k}} is more than 2")
    """
    )
    folder("vendor", source.format(ok=True, reason="", fill=42))
    monkeypatch.setenv(VARIABLE, "vendor,torch")
    logits, lengths = torch.randn(1, 8), torch.tensor([8], dtype=torch.int32)
    assert topk.select(logits, lengths, 2).eq(42).all()
    assert not topk.select(logits, lengths, 3).eq(42).any()
    with pytest.raises(ValueError, match="k=3 is more than 2"):
        topk.select(logits, lengths, 3, impl="vendor")


def test_a_file_without_the_function_is_no_candidate(folder):
    folder("vendor", "from nsa_backend_plugin.ops.support import YES\ndef available(arch): return YES\n")
    assert "vendor" not in Operation.all["topk.select"].implementations()
    with pytest.raises(ValueError, match="has no select"):
        select(impl="vendor")


def test_workspace_is_the_largest_of_those_available(folder):
    sized = VENDOR + "    def workspace_bytes_select(device, rows): return rows * {fill} * (device.type == 'cpu')\n"
    folder("small", sized.format(ok=True, reason="", fill=10))
    folder("large", sized.format(ok=True, reason="", fill=30))
    folder("absent", sized.format(ok=False, reason="no", fill=90))
    assert Operation.all["topk.select"].workspace_bytes(CPU, rows=3) == 90


ROWS = (
    Preference("topk.select", "sm_90", ("a", "b"), "test", {"k": 2048, "rows": (1, 16)}),
    Preference("topk.select", "cuda", ("c",), "test"),
    Preference("topk.select", "*", ("d",), "test"),
    Preference("topk.select", "rocm", ("never",), "test"),
)


@pytest.mark.parametrize(
    "arch, shape, expected",
    [
        ("sm_90", {"k": 2048, "rows": 1}, ("a", "b")),
        ("sm_90", {"k": 2048, "rows": 16}, ("a", "b")),
        ("sm_90", {"k": 2048, "rows": 17}, ("c",)),
        ("sm_90", {"k": 64, "rows": 1}, ("c",)),
        ("sm_90", {}, ("c",)),
        ("sm_80", {"k": 2048, "rows": 1}, ("c",)),
        ("gfx942", {"k": 2048, "rows": 1}, ("d",)),
        ("cpu", {"k": 2048, "rows": 1}, ("torch",)),
    ],
)
def test_preference_rows(monkeypatch, arch, shape, expected):
    monkeypatch.setattr(preferences, "TABLE", ROWS)
    assert preferences.order("topk.select", arch, shape) == expected
    assert preferences.order("topk.other", "sm_90", shape) == ()


def test_preferred_then_triton_then_torch(folder, monkeypatch):
    folder("vendor", VENDOR.format(ok=True, reason="", fill=42))
    monkeypatch.setattr(registry, "device_arch", lambda device: "sm_90")
    monkeypatch.setattr(preferences, "TABLE", (Preference("topk.select", "sm_90", ("vendor",), "test"),))
    assert select().eq(42).all()
    names, forced = Operation.all["topk.select"]._order(None, "sm_90", {})
    assert names[0] == "vendor"
    assert names[-1] == "torch"
    assert not forced


def test_table_names_known_operations_and_files_with_a_source():
    known = {operation.name: operation.op for operation in registry.operations()}
    for row in preferences.TABLE:
        assert row.operation in known
        registry.check_names(known[row.operation], row.order, row.operation)
        assert row.source


def test_report_has_one_line_per_operation_with_winner_and_reasons(folder):
    folder("vendor", VENDOR.format(ok=False, reason="needs four arms", fill=42))
    lines = registry.report(CPU)
    assert [line.split(":")[0] for line in lines] == [operation.name for operation in registry.operations()]
    line = next(line for line in lines if line.startswith("topk.select"))
    assert line.startswith("topk.select: torch (")
    assert "vendor needs four arms" in line


def test_no_implementation_at_all(folder, monkeypatch):
    monkeypatch.setattr(registry, "_available", lambda *a: registry.Support(False, "not today"))
    with pytest.raises(ValueError, match=r"topk\.select: no implementation can run \(.*torch: not today"):
        select()
