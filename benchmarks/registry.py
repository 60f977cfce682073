"""What the suite asks of the library's dispatcher: the only module of the suite that knows it."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

from nsa_backend_plugin.engine import kernels
from nsa_backend_plugin.ops import registry

kernels.register()

_OURS = Path(registry.__file__).parents[1]
#: What kernels are written in. An implementation that imports anything else calls a kernel that lives there.
_LANGUAGES = {"torch", "triton", "tilelang", "cuda", "cutlass", "numpy"}
_DECLINED = "forced implementation cannot run ("


@functools.cache
def _operations() -> dict[str, registry.Operation]:
    return {operation.name: operation for operation in registry.operations()}


def operations() -> list[str]:
    """Names, such as "sparse_mla.attend"."""
    return list(_operations())


def implementations(operation: str) -> list[str]:
    return _operations()[operation].implementations()


def unavailable(operation: str, name: str, device: str) -> str:
    """Why an implementation cannot run on a device, whatever it is called with; "" when it can."""
    return next(c.support.reason for c in _operations()[operation].candidates(device) if c.name == name)


def declined(error: Exception) -> str:
    """Why the implementations that were asked did not take a call, when that is what the error says; else ""."""
    if isinstance(error, ValueError) and _DECLINED in str(error):
        return str(error).partition(_DECLINED)[2].removesuffix(")").partition(": ")[2]
    return ""


@functools.cache
def is_own(operation: str, name: str) -> bool:
    """Whether an implementation's kernel lives in this repository, not in a library that its file calls."""
    if name not in implementations(operation):
        return False
    op = operation.partition(".")[0]
    external = registry._external.get((op, name))
    file = _OURS.joinpath(*external.split(".")[1:]) if external else _OURS / "ops" / op / name
    return not _libraries(file.with_suffix(".py") if name != "torch" else file.with_name("reference.py"))


def _libraries(file: Path, names: frozenset[str] | None = None) -> set[str]:
    """Packages with kernels that a file imports, or only its functions `names`. What it uses of our own shared modules
    is looked into."""
    found: set[str] = set()
    body = ast.parse(file.read_text()).body
    nodes = [node for top in body if names is None or getattr(top, "name", None) in names for node in ast.walk(top)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(_OURS.name):
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module:
            home = _OURS.joinpath(*node.module.split(".")[1:])
            for alias in node.names:
                whole = (home / alias.name).with_suffix(".py")
                used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == alias.name}
                source, wanted = (whole, used) if whole.exists() else (home.with_suffix(".py"), {alias.name})
                found |= _libraries(source, frozenset(wanted)) if source.exists() else set()
    return found - _LANGUAGES - set(sys.stdlib_module_names)
