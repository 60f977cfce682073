"""Imports point one way, and the entry point costs nothing: SGLang imports it in every process it starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "nsa_backend_plugin"
HEAVY = ("torch", "triton", "sglang", "numpy", "sgl_kernel", "deep_gemm", "flashinfer", "tilelang", "aiter")


def imported_names(path: Path) -> set[str]:
    """Every module named in an import statement of a file, at any depth of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def matches(names: set[str], *packages: str) -> list[str]:
    return sorted(n for n in names if any(n == p or n.startswith(p + ".") for p in packages))


def modules_after(code: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter that ran the code."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    return set(done.stdout.split())


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_ops_name_neither_sglang_nor_the_layers_above(path):
    layers = [f"nsa_backend_plugin.{name}" for name in ("engine", "plugin", "cli", "commands", "serving")]
    assert matches(imported_names(path), "sglang", *layers) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_engine_does_not_name_the_layers_above(path):
    above = [f"nsa_backend_plugin.{name}" for name in ("plugin", "cli", "commands")]
    assert matches(imported_names(path), *above) == []


def test_ops_import_without_sglang():
    """With sglang barred, every operation and its implementations import and report."""
    code = (
        "import sys; sys.modules['sglang'] = None\n"
        "from nsa_backend_plugin.runtime import served\n"
        "assert len(served.report(served.examples('cpu')['DeepSeek-V3.2, 16 heads'], served.TYPICAL, 'cpu')) >= 8\n"
        "del sys.modules['sglang']"
    )
    assert "sglang" not in modules_after(code)


def test_package_import_is_light():
    assert modules_after("import nsa_backend_plugin").isdisjoint(HEAVY)


def test_entry_points_import_is_light():
    points = [
        p for g in ("sglang.srt.plugins", "sglang.srt.platforms") for p in entry_points(group=g) if "nsa" in p.name
    ]
    assert {p.name for p in points} == {"nsa_plugin", "nsa_plugin_cpu"}
    code = "\n".join(f"import {p.module}; {p.module}.{p.attr}" for p in points)
    assert modules_after(code).isdisjoint(HEAVY)


def test_command_help_is_light():
    assert modules_after("from nsa_backend_plugin import cli; cli.build_parser(cli.command_names())").isdisjoint(HEAVY)


def test_operations_import_on_first_use():
    code = "from nsa_backend_plugin import ops; assert 'sparse_mla' in dir(ops)"
    assert modules_after(code).isdisjoint(HEAVY)
    assert "torch" in modules_after(f"{code}; assert callable(ops.sparse_mla.attend) and callable(ops.topk.select)")


def test_ops_has_no_other_attributes():
    from nsa_backend_plugin import ops

    with pytest.raises(AttributeError, match="'sparse_mlaa'"):
        ops.sparse_mlaa  # noqa: B018
