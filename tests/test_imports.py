"""Imports point one way, and the entry point costs nothing: SGLang imports it in every process it starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from nsa_backend_plugin import settings

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


def module_name(path: Path) -> str:
    parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_files(path: Path) -> set[str]:
    """The package's own modules that a file names in import statements, at any depth of it, but itself."""
    modules = {name if name in FILES else name.rpartition(".")[0] for name in imported_names(path)}
    return (modules & set(FILES)) - {module_name(path)}


def folder(module: str) -> str:
    """The package a module's file lies in; of a file that lies beside folders, the file."""
    inside = FILES[module].parent
    return module if any(inside.glob("*/__init__.py")) else module_name(inside / "__init__.py")


def circle(graph: dict[str, set[str]]) -> tuple[str, ...]:
    """A circle of a graph, in order; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return tuple(error.args[1])
    return ()


def matches(names: set[str], *packages: str) -> list[str]:
    return sorted(n for n in names if any(n == p or n.startswith(p + ".") for p in packages))


def modules_after(code: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter that ran the code."""
    script = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "path",
    sorted(path for layer in ("ops", "runtime") for path in (PACKAGE / layer).rglob("*.py")),
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_ops_and_runtime_name_neither_sglang_nor_the_layers_above(path):
    layers = [f"nsa_backend_plugin.{name}" for name in ("engine", "plugin", "cli", "commands", "serving")]
    assert matches(imported_names(path), "sglang", *layers) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "engine").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_engine_does_not_name_the_layers_above(path):
    above = [f"nsa_backend_plugin.{name}" for name in ("plugin", "cli", "commands")]
    assert matches(imported_names(path), *above) == []


def test_no_circle_between_files():
    """Below the engine."""
    inside = {m: imported_files(path) for m, path in FILES.items() if not m.startswith(f"{PACKAGE.name}.engine")}
    assert circle(inside) == ()


def test_no_circle_between_packages():
    """Below the engine."""
    graph: dict[str, set[str]] = {}
    for module, path in FILES.items():
        if not module.startswith(f"{PACKAGE.name}.engine"):
            others = {folder(other) for other in imported_files(path)} - {folder(module)}
            graph.setdefault(folder(module), set()).update(others)
    assert circle(graph) == ()


def test_nothing_in_ops_imports_from_an_operation_but_itself():
    """What two operations share lies in a folder with an underscore, or in a file beside the folders."""
    operations = {f"{PACKAGE.name}.ops.{name}" for name in settings.OPERATIONS}
    crossing = [
        (module, other)
        for module in FILES
        for other in imported_files(FILES[module])
        if module.startswith(f"{PACKAGE.name}.ops.") and folder(other) in operations - {folder(module)}
    ]
    assert crossing == []


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == ()
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


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
